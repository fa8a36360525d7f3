"""A sample of tokens on which every expert of a layer is run, and on which its router chooses again without some.

Inputs of the sampled tokens are kept while the batches of a segment go through a layer. Then the model's own block is
called on them, with experts masked as `model.masking` does, and left as soon as its router has chosen. So the sums of a
segment are its own, whichever process has it, and add up as all others do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekern import kernels
from moekern.architectures import Layout
from moekern.criteria.mixture import SPREAD
from moekern.errors import InputError
from moekern.measurement.batch import InFlight
from moekern.measurement.probe import Chosen, Probe
from moekern.model.compute import few_tokens
from moekern.model.experts import experts_of
from moekern.model.masking import masked_layer
from moekern.model.transformers_api import Loader, router_modules
from moekern.statistics.layer import LayerStatistics

TILE = 1 << 25  # numbers of all experts' outputs that are held at a time
TOGETHER = 128  # tokens of a segment that are replayed, where it has so many: of fewer, products take longer each
FEW_TIES = 2  # tokens that may have been chosen for otherwise, however few there are


def sample(tokens: Sequence[int], size: int) -> list[Tensor]:
    """Which tokens of each batch are replayed: `size` in all, evenly from batches of `tokens` tokens, seeded."""
    total, rows, before, taken = sum(tokens), list[Tensor](), 0, 0
    for number, n in enumerate(tokens):
        before += n
        upto = min(size, total) * before // total
        draw = torch.Generator().manual_seed(number)
        rows.append(torch.randperm(n, generator=draw)[: upto - taken].sort().values)
        taken = upto
    return rows


def sampled(segments: Sequence[int], size: int) -> list[int]:
    """Which segments, of so many tokens each, a sample of `size` is drawn from: evenly from all, as few as give each
    TOGETHER tokens at least, or hold `size` at all."""
    for count in range(max(1, min(size // TOGETHER, len(segments))), len(segments)):
        found = [(2 * i + 1) * len(segments) // (2 * count) for i in range(count)]
        if sum(segments[i] for i in found) >= size:
            return found
    return list(range(len(segments)))


@dataclass(frozen=True)
class Sample:
    """Tokens of one batch: what the block was called with for them, and the experts that were chosen."""

    call: Any
    ids: Tensor


@dataclass
class Totals:
    """Of tokens' sums of gates: how many, Σ and Σ of their squares."""

    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def add(self, ids: Tensor, gates: Tensor, E: int) -> None:
        """Of [T, K] ids and gates."""
        each = gates.double().where((ids >= 0) & (ids < E), 0).sum(1)
        self.count += len(each)
        self.sums = self.sums.to(each.device) + torch.stack((each.sum(), each @ each))

    @property
    def one_number(self) -> bool:
        """Whether all are alike but for rounding."""
        mean, square = (self.sums / max(1, self.count)).tolist()
        return bool(square - mean**2 < (SPREAD * mean) ** 2)


@dataclass
class Replay:
    """Samples of the segment at work, of each layer that runs: of each batch the tokens that its context names."""

    loader: Loader
    layout: Layout
    layers: Mapping[str, nn.Module]  # plan key -> decoder layer
    flight: InFlight
    backend: str | None = None
    probes: Mapping[str, Probe] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # layer -> of the segment, in the order of the text
    totals: Totals = field(default_factory=lambda: Totals())  # of gates, over all of the segment's tokens
    asked: int = 0  # tokens of the layer for which the router was asked again
    otherwise: int = 0  # those for which it chose otherwise

    def check(self) -> None:
        """Raise InputError, before anything is run, for a family that cannot be replayed."""
        if any(tensor.trailing for layer in self.layout.layers.values() for tensor in layer.tensors):
            name = self.layout.family.name
            raise InputError(f"--tier replay: {name} also routes to what is no expert, which is not replayed")
        for key, layer in self.layers.items():
            block_of(key, layer, self.loader.model)

    @contextmanager
    def watching(self, probes: Mapping[str, Probe]) -> Iterator[None]:
        """Keep samples of these layers while the context is open."""
        self.probes = probes
        with ExitStack() as stack:
            for key in probes:
                layer = self.layers[key]
                handle = block_of(key, layer, self.loader.model).register_forward_hook(
                    self._keep(key), with_kwargs=True
                )
                stack.callback(handle.remove)
            yield

    def _keep(self, key: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            probe, context = self.probes[key], self.flight.context
            if context is None or probe.ids is None or probe.gates is None:
                return
            self.totals.add(probe.ids, probe.gates, self.layout.layers[key].num_experts)
            if context.sample is not None and len(context.sample):
                rows = context.sample.to(probe.ids.device)
                call = _sliced((args, kwargs), context.shape, rows)
                self.samples.setdefault(key, []).append(Sample(call, probe.ids[rows]))

        return hook

    def forget(self) -> None:
        """Nothing has been seen yet."""
        self.samples, self.totals, self.asked, self.otherwise = {}, Totals(), 0, 0

    def finish(self, key: str, sums: LayerStatistics) -> None:
        """A segment has gone through a layer, whose weights must be there: add the replay of its sample to its sums."""
        kept, totals, self.totals = self.samples.pop(key, []), self.totals, Totals()
        if not kept:
            return
        call, seen = _joined([each.call for each in kept]), torch.cat([each.ids for each in kept])
        with few_tokens(len(seen), seen.device):
            chosen = self._choose(key, call)
        same = seen.shape == chosen.ids.shape and (seen.sort(1).values == chosen.ids.sort(1).values).all(1)
        self.asked, self.otherwise = (
            self.asked + len(seen),
            self.otherwise + len(seen) - int(torch.as_tensor(same).sum()),
        )
        E = sums.num_experts
        gates = _dense(chosen, E)
        scores = torch.zeros_like(gates) if chosen.logits is None else chosen.logits[:, :E].double().softmax(1)
        with few_tokens(0, gates.device):  # some experts have a token or two, on which the router is asked again
            lost = self._deletions(key, call, chosen, gates)
            refilled = lost if totals.one_number else _with_frozen_gates(lost, chosen, gates)
            subsets = self._subsets(key, call, chosen, gates) if sums.subset_loss.numel() else None
        n, H = len(gates), sums.output_sum.shape[1]
        step = max(1, TILE // (E * H))
        for start in range(0, n, step):
            tokens = torch.arange(start, min(n, start + step), device=gates.device)
            offsets = torch.arange(E + 1, device=gates.device) * len(tokens)
            y = chosen.outputs(tokens.repeat(E), offsets).view(E, len(tokens), H)
            part = slice(start, start + step)
            _add_outputs(y, scores[part], sums, self.backend)
            with few_tokens(0, gates.device):  # a token at a time
                own = lost[part]
                _add_deletions(y, chosen.ids[part].long(), own, own if refilled is lost else refilled[part], sums)
                if subsets is not None:
                    _add_subsets(y, subsets[part], sums)

    def check_alike(self, key: str) -> None:
        """All segments of this process have gone through a layer. Raises InputError where its router, asked again, has
        chosen otherwise for many tokens: products of another shape round differently, so a near tie may go the other
        way, and of few tokens that says nothing; but a wrong call changes most."""
        asked, otherwise, self.asked, self.otherwise = self.asked, self.otherwise, 0, 0
        if otherwise > FEW_TIES + asked // 8:
            raise InputError(f"--tier replay: layer {key}: {self._name(key)} does not choose alike when asked again")

    def _name(self, key: str) -> str:
        return type(block_of(key, self.layers[key], self.loader.model)).__name__

    def _choose(self, key: str, call: Any, dropped: Sequence[int] = ()) -> Chosen:
        """What the router chooses for a call of the block, with experts masked."""
        module, probe = self.layers[key], self.probes[key]
        args, kwargs = call
        probe.choosing = True
        try:
            with masked_layer(self.loader, self.layout.layers[key], module, dropped):
                block_of(key, module, self.loader.model)(*args, **kwargs)
        except Chosen as chosen:
            return chosen
        finally:
            probe.choosing = False
        raise InputError(f"--tier replay: layer {key}: {self._name(key)} calls its experts in a way that is not seen")

    def _deletions(self, key: str, call: Any, chosen: Chosen, gates: Tensor) -> Tensor:
        """[n, K, E]: by how much each token's gates fall when its k-th expert is dropped; 0 for an empty slot."""
        (n, K), E = chosen.ids.shape, gates.shape[1]
        lost = torch.zeros(n, K, E, dtype=torch.float64, device=gates.device)
        for e in range(E):
            token, slot = (chosen.ids == e).nonzero(as_tuple=True)
            if len(token):
                again = self._choose(key, _sliced(call, (1, n), token), (e,))
                lost[token, slot] = gates[token] - _dense(again, E, (e,))
        return lost

    def _subsets(self, key: str, call: Any, chosen: Chosen, gates: Tensor) -> Tensor:
        """[n, 2^E, E]: the same for every kept set, by its bits; sets that are too small lose all."""
        E = gates.shape[1]
        lost = gates[:, None].repeat(1, 1 << E, 1)
        for kept in range(1 << E):
            dropped = [e for e in range(E) if not kept >> e & 1]
            if E - len(dropped) >= chosen.ids.shape[1]:
                again = self._choose(key, call, dropped) if dropped else chosen
                lost[:, kept] -= _dense(again, E, dropped)
        return lost


def block_of(key: str, layer: nn.Module, model: nn.Module) -> nn.Module:
    """The smallest part of a decoder layer that calls its router and its experts.

    Raises InputError where that is the decoder layer itself, which cannot be run again alone.
    """
    experts = experts_of(layer)
    path = next(name for name, module in layer.named_modules() if module is experts)
    routers = [name for name in router_modules(layer, model) if name]
    if not routers:  # the router of a layer that chooses by token id is not recorded: it is beside the experts
        return layer.get_submodule(path.rpartition(".")[0])
    while path and not any(router.startswith(path + ".") for router in routers):
        path = path.rpartition(".")[0]
    if not path:
        name = type(layer).__name__
        raise InputError(f"--tier replay: layer {key}: {name} calls its router itself, so it cannot be asked again")
    return layer.get_submodule(path)


def _sliced(call: Any, shape: tuple[int, int], rows: Tensor) -> Any:
    """The arguments of a call for some of its B x S tokens: [B, S, ...] become [1, n, ...], [B * S, ...] [n, ...]."""
    if isinstance(call, Tensor):
        if call.shape[:2] == shape:
            return call.flatten(0, 1)[rows][None]
        return call[rows] if call.shape[:1] == (shape[0] * shape[1],) else call
    if isinstance(call, dict):
        return {name: _sliced(value, shape, rows) for name, value in call.items()}
    return tuple(_sliced(value, shape, rows) for value in call) if isinstance(call, tuple) else call


def _joined(calls: Sequence[Any]) -> Any:
    """One call for the tokens of several, each of which is `_sliced`."""
    first = calls[0]
    if isinstance(first, Tensor):
        axis = 1 if first.ndim > 1 and len(first) == 1 else 0
        return torch.cat(list(calls), axis)
    if isinstance(first, dict):
        return {name: _joined([call[name] for call in calls]) for name in first}
    return tuple(_joined(values) for values in zip(*calls, strict=True)) if isinstance(first, tuple) else first


def _dense(chosen: Chosen, E: int, dropped: Sequence[int] = ()) -> Tensor:
    """[n, E] float64: gates, 0 where not chosen. A dropped expert that no other could replace adds nothing."""
    ids = chosen.ids.long()
    filled = (ids >= 0) & (ids < E)
    for e in dropped:
        filled &= ids != e
    gates = torch.zeros(len(ids), E, dtype=torch.float64, device=ids.device)
    return gates.scatter_add_(1, ids.where(filled, 0), torch.where(filled, chosen.gates.double(), 0))


def _with_frozen_gates(lost: Tensor, chosen: Chosen, gates: Tensor) -> Tensor:
    """`lost` [n, K, E] where the token's other experts keep their gates, and the promoted one has its gate in their
    measure: as it stood beside them before one was dropped."""
    n, K, E = lost.shape
    own = chosen.ids.long()[:, :, None] == torch.arange(E, device=lost.device)  # [n, K, E] the dropped expert
    before = gates[:, None].expand(n, K, E)
    others = (before != 0) & ~own & own.any(2, keepdim=True)
    after = before - lost
    now = torch.where(others, after, 0).sum(2, keepdim=True)
    scale = torch.where(now == 0, 1, torch.where(others, before, 0).sum(2, keepdim=True) / now)
    return torch.where(others, 0, torch.where(own, lost, lost * scale))


def _add_outputs(y: Tensor, scores: Tensor, sums: LayerStatistics, backend: str | None) -> None:
    """y is [E, n, H]: all experts on a tile of tokens, scores [n, E] the softmax of their logits."""
    alike = kernels.SimilaritySums(sums.replay_tokens, sums.output_gram, sums.output_cosine)
    kernels.similarity(y, None, alike, backend=backend)
    for e, rows in enumerate(y):
        sums.output_sum[e] += rows.double().sum(0)
        sums.scored_output_sum[e] += (scores[:, e, None] * rows.double()).sum(0)


def _add_deletions(y: Tensor, ids: Tensor, lost: Tensor, refilled: Tensor, sums: LayerStatistics) -> None:
    """Of a tile: ids [n, K], lost and refilled [n, K, E]. An empty slot has lost nothing and is left out."""
    for t, own in enumerate(ids):
        filled = (own >= 0) & (own < len(y))
        e = own[filled]
        delta = lost[t, filled] @ y[:, t].double()
        sums.deletion_norm_sum[e] += delta.norm(dim=1)
        sums.deletion_gram[e[:, None], e] += delta @ delta.T
        sums.deletion_sum[e] += delta
        sums.deletion_count[e] += 1
        change = delta if refilled is lost else refilled[t, filled] @ y[:, t].double()
        sums.refill_square_sum[e] += change.square().sum(1)


def _add_subsets(y: Tensor, lost: Tensor, sums: LayerStatistics) -> None:
    """Of a tile: lost [n, 2^E, E]; ‖Σ lost y‖² by the token's Gram matrix."""
    for t, change in enumerate(lost):
        rows = y[:, t].double()
        sums.subset_loss.add_(((change @ (rows @ rows.T)) * change).sum(1).clamp(min=0))
