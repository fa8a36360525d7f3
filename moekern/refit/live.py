"""The experts of a decoder layer in memory, on the rows that a text gave them: what a refit is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekern import kernels
from moekern.errors import InputError
from moekern.kernels import sort_by_expert
from moekern.model.apart import Combining
from moekern.model.experts import Outputs, experts_of, in_place
from moekern.model.layerwise import LayerwiseModel
from moekern.model.projections import Halves, halves, one_expert, views
from moekern.model.walk import hidden_of
from moekern.refit.refine import Trainable
from moekern.refit.rows import RowStore
from moekern.refit.stored import StoredExperts
from moekern.refit.units import ROWS, Unit, Units, one_group

See = Callable[[Tensor, Tensor, Tensor, bool], None]  # (rows [T, H], ids [T, K], gates [T, K], gates are in the rows)


@dataclass
class Asked:
    """What experts are given for N tokens."""

    rows: RowStore  # [N, H], in the type that is computed in
    ids: Tensor  # [N, K] int32, below 0 or from n on where a slot is empty
    gates: Tensor  # [N, K] float32
    applied: bool = False  # an expert is given gate x row, and its output is added as it is


@dataclass
class Listening:
    """A watcher that is told what experts are called with. Where it is `silent` they put out zeros."""

    hear: See = lambda rows, ids, gates, applied: None
    silent: bool = True
    hidden: int = 0  # H of what experts put out
    put_out: Tensor | None = None  # the last output, [T, H], where it is not silent
    empty_slots: bool = True
    differentiable: bool = False

    def measure(
        self,
        hidden: Tensor,
        ids: Tensor,
        gates: Tensor,
        num_experts: int,
        outputs: Outputs,
        *,
        gates_applied: bool = False,
    ) -> Tensor:
        """As `experts.Watcher`."""
        self.hear(hidden, ids, gates, gates_applied)
        if self.silent:
            return hidden.new_zeros(len(hidden), self.hidden)
        self.put_out = Combining().measure(hidden, ids, gates, num_experts, outputs, gates_applied=gates_applied)
        return self.put_out


@contextmanager
def listening(layer: nn.Module, watcher: Listening) -> Iterator[None]:
    """Let `watcher` hear what a layer's experts are called with."""
    block = block_of(layer)
    watcher.hidden = views(block).down.shape[1]
    with in_place(block, watcher):
        yield


@contextmanager
def made_by(layer: nn.Module, came: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell `came` what hidden states a layer makes, before anything else looks at them."""
    hook = layer.register_forward_hook(lambda module, args, output: came(hidden_of(output)), prepend=True)
    try:
        yield
    finally:
        hook.remove()


def check_layers(layerwise: LayerwiseModel) -> None:
    """Raise InputError, naming the layer, where experts cannot be refitted: they are run in groups, or not held in a
    way that is known."""
    for i, groups in layerwise.groups.cuts.items():
        where = f"layer {layerwise.moe_keys[i]} is run in {len(groups)} groups of experts"
        raise layerwise.takes.refusal(f"{where}, and such layers are not refitted")
    for i, key in layerwise.moe_keys.items():
        block = experts_of(layerwise.layers[i])
        if block is None or halves(block) is None:
            what = "its experts are not held together, as where each is a module of a list, and are not refitted"
            raise InputError(f"{layerwise.checkpoint.folder}: layer {key}: {what}; prune it without a refit")


def block_of(layer: nn.Module) -> nn.Module:
    """The experts of a layer that has been checked."""
    block = experts_of(layer)
    assert block is not None
    return block


class LiveExperts:
    """As `ridge.Experts` and `refine.TrainableExperts`: the experts that the layer has now, and what they are asked.

    Each process has the rows of its own tokens. With `stored` the layer only ever holds what the checkpoint can.
    """

    def __init__(
        self, block: nn.Module, asked: Asked, device: torch.device, stored: StoredExperts | None = None
    ) -> None:
        found = halves(block)
        assert found is not None
        self.stored = stored
        self.block, self.asked, self.device = block, asked, device
        self.known, self.views = found, views(block)
        self.count, self.hidden, self.width = self.views.down.shape
        order, offsets = sort_by_expert(asked.ids, self.count)
        self.offsets = offsets.tolist()
        self.order = order[: self.offsets[-1]]  # [rows]: token x K + slot, expert after expert and rising
        self.alone: tuple[int, nn.Module] | None = None  # the expert that was wanted last, and its number

    def tokens(self, expert: int) -> Tensor:
        return self._slots(expert) // self.asked.ids.shape[1]

    def inputs(self, expert: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [len, H], float32, and what their outputs are multiplied by, [len]."""
        rows, gates = self._given(expert, tokens)
        return rows.float(), gates

    def features(self, expert: int, tokens: Tensor) -> Tensor:
        inner, gates = self._inner(expert, tokens)
        return inner.float() * gates[:, None]

    def outputs(self, expert: int, tokens: Tensor) -> Tensor:
        """What the expert adds to the output of some of its tokens, float32 [len, H]."""
        rows, gates = self._given(expert, tokens)
        with torch.no_grad():
            y = self.known(self._one(expert), rows, one_group(rows))
        return y.float() * gates[:, None]

    def down(self, expert: int) -> Tensor:
        return self.views.down[expert].float()

    def set_down(self, expert: int, weight: Tensor) -> Tensor:
        self.views.down[expert].copy_(weight if self.stored is None else self.stored.down(expert, weight))
        self.alone = None
        return self.down(expert)

    def trainable(self, expert: int) -> Trainable:
        one = one_expert(self.block, expert)
        for parameter in one.parameters():
            parameter.data = parameter.data.float()
        return _Trained(one, self.known, [one.get_parameter(path) for path in self.known.parameters])

    def store(self, expert: int, trained: Trainable) -> None:
        paths = self.known.parameters
        rows = len(self.block.get_parameter(paths[-1])) // self.count
        with torch.no_grad():
            if self.stored is not None:
                assert isinstance(trained, _Trained)
                self.stored.all(expert, views(trained.one))
            for path, own in zip(paths, trained.parameters, strict=True):
                whole = self.block.get_parameter(path)[expert * rows : (expert + 1) * rows]
                whole.copy_(own)
                own.copy_(whole)
        self.alone = None

    def subtract_from(self, residual: RowStore, units: Sequence[Unit], step: Callable[[], None]) -> None:
        """Take what all experts put out from float32 [N, H]: a unit at a time, since rows may be rounded by how many
        are computed together. `step` is called behind each."""
        for expert in range(self.count):
            own = self.tokens(expert)
            for unit in units:
                for tokens in own[(own >= unit.start) & (own < unit.stop)].split(ROWS):
                    put_out = self.outputs(expert, tokens).to(residual.tensor.device)
                    residual.scatter(tokens, residual.gather(tokens) - put_out)
            step()

    def energies(self, parts: Units, counted: Tensor, backend: str | None = None) -> Tensor:
        """Sums over all processes' tokens, of those that are `counted` (bool [N]), of the squares of features, float64
        [n, I] at every rank: a unit at a time, in their order. `backend` of the kernel, None: the device's first."""

        def of_unit(place: int) -> list[Tensor]:
            total = torch.zeros(self.count, self.width, dtype=torch.float64, device=self.device)
            unit = parts.own[place]
            for expert in range(self.count):
                tokens = self.tokens(expert)
                tokens = tokens[(tokens >= unit.start) & (tokens < unit.stop)]
                for rows in tokens[counted[tokens]].split(ROWS):
                    inner, gates = self._inner(expert, rows)
                    own = total[expert : expert + 1]
                    kernels.gated_energy(inner.contiguous(), gates, one_group(inner), None, own, backend=backend)
            return [total.cpu()]

        sums = parts.summed(of_unit)
        return parts.team.broadcast(torch.zeros(self.count, self.width).double() if sums is None else sums[0])

    def _slots(self, expert: int) -> Tensor:
        return self.order[self.offsets[expert] : self.offsets[expert + 1]]

    def _given(self, expert: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as the expert is given them, and what its outputs are multiplied by (float32)."""
        slots, K = self._slots(expert), self.asked.ids.shape[1]
        places = torch.searchsorted(slots // K, tokens)
        gates = self.asked.gates.flatten()[slots[places]].to(self.device)
        rows = self.asked.rows.gather(tokens).to(self.device)
        if not self.asked.applied:
            return rows, gates
        return rows * gates[:, None].to(rows.dtype), torch.ones_like(gates)

    def _inner(self, expert: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the down projection [len, m], in the type that is computed in, and the gates, float32."""
        rows, gates = self._given(expert, tokens)
        with torch.no_grad():
            return self.known.inner(self._one(expert), rows, one_group(rows)), gates

    def _one(self, expert: int) -> nn.Module:
        if self.alone is None or self.alone[0] != expert:
            self.alone = expert, one_expert(self.block, expert, requires_grad=False)
        return self.alone[1]


@dataclass
class _Trained:
    """As `refine.Trainable`."""

    one: nn.Module
    known: Halves
    parameters: Sequence[Tensor]

    def forward(self, rows: Tensor, gates: Tensor) -> Tensor:
        y: Tensor = self.known(self.one, rows, one_group(rows))
        return y * gates[:, None]
