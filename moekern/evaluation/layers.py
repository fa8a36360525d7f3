"""What becomes of a plan's stream of hidden states behind each decoder layer, and of its router's choice in it, against
the original's stream: seen while all go through the layers in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from moekern.evaluation.losses import LayerFigures, Row
from moekern.evaluation.predictions import chunks
from moekern.model.experts import experts_of
from moekern.model.walk import hidden_of
from moekern.plan.document import Plan

STREAM, CHOICE = "stream ", "choice "  # and the number of a decoder layer: what is added up there
AGREEING = 4  # numbers of a choice, before counts of experts


@dataclass(frozen=True)
class Choice:
    """ids [T, K] int64 of the experts that tokens chose, by their numbers in the original, -1 of slots without one;
    first [T] those with the largest gate."""

    ids: Tensor
    first: Tensor


@dataclass
class Watch:
    """Hangs on the decoder layers of a model and on their experts' call. `experts` [by decoder layer] is how many there
    are in the original."""

    layers: nn.ModuleList
    experts: Mapping[int, int]
    at: int = -1  # the layer that runs
    output: Tensor | None = None  # what it has made, where it has run to its end; of the last layer until it runs again
    given: tuple[Tensor, Tensor] | None = None  # ids and gates that its experts were called with
    original: dict[int, Choice] = field(default_factory=dict)  # of the layer that runs, by batch
    unseen: set[int] = field(default_factory=set)  # layers whose experts are called without ids

    @contextmanager
    def hung(self) -> Iterator[None]:
        """While the context is open it is seen that layers have run."""
        with ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_hook(self._made(i)).remove)
            yield

    def _made(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if i == self.at:
                self.output = hidden_of(output)

        return hook

    def choosing(self, layer: int) -> Callable[[], None]:
        """Keep what the experts of a layer, as it is now, are called with, until what is returned is called."""
        block = experts_of(self.layers[layer])
        if block is None:
            return lambda: None
        return block.register_forward_pre_hook(self._called, with_kwargs=True).remove

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        ids = next((value for value in given if value.ndim == 2 and not value.is_floating_point()), None)
        beside = [value for value in given[1:] if value.is_floating_point()]  # the first are hidden states
        gates = None if ids is None else next((value for value in beside if value.shape == ids.shape), None)
        self.given = None if ids is None or gates is None else (ids, gates)

    def taken(self, place: int, plan: Plan | None, key: str | None) -> Tensor | None:
        """Of the task that has run a layer, float64: `agreement` with the original's choice (zeros of the original
        itself, and of a plan that merges experts), and how often each expert was chosen [E]. None where it has only
        asked for its experts' rows, or the choice is not seen."""
        ran, given, E = self.output is not None, self.given, self.experts.get(self.at, 0)
        if self.at < len(self.layers) - 1:
            self.output = None
        self.given = None
        if not ran or not E:
            return None
        if given is None:
            self.unseen.add(self.at)
            return None
        layer = None if plan is None or key is None else plan.layers[key]
        renumbered = layer is not None and plan is not None and plan.replace is None
        choice = chosen(*given, E, layer.keep if layer is not None and renumbered else None)
        found = torch.zeros(AGREEING + E, dtype=torch.float64)
        found[AGREEING:] = torch.bincount(choice.ids[choice.ids >= 0], minlength=E).double()
        if layer is None:
            self.original[place] = choice
        elif plan is not None and not plan.merges:
            found[:AGREEING] = agreement(choice, self.original[place], torch.tensor(layer.keep), E)
        return found

    def done(self) -> None:
        """The layer has run."""
        self.original.clear()


def apart(hidden: Tensor, original: Tensor, device: torch.device) -> Tensor:
    """Over rows of [..., H], float64 [4]: their number, sums of ||h - h0||^2, of ||h0||^2, and of cosines (0 of a zero
    with another vector)."""
    H = hidden.shape[-1]
    mine, theirs = hidden.reshape(-1, H), original.reshape(-1, H)
    sums = torch.tensor([len(mine), 0, 0, 0], dtype=torch.float64)
    for rows in chunks(len(mine), H):
        h, h0 = mine[rows].to(device).double(), theirs[rows].to(device).double()
        cosines = cosine_similarity(h, h0, dim=1, eps=1e-30)
        parts = (h - h0).square().sum(1).sum(), h0.square().sum(1).sum(), cosines.sum()
        sums[1:] += torch.stack(parts).cpu()
    return sums


def chosen(ids: Tensor, gates: Tensor, experts: int, keep: Sequence[int] | None) -> Choice:
    """keep: the original numbers of the experts that ids [T, K] count (None: all, as they are). An id that is no
    expert, and a gate of 0, are slots without one."""
    ids, gates = ids.long().cpu(), gates.float().cpu()
    numbers = torch.arange(experts) if keep is None else torch.tensor(keep)
    there = (ids >= 0) & (ids < len(numbers)) & (gates != 0)
    ids = torch.where(there, numbers[ids.clamp(0, len(numbers) - 1)], -1)
    best = gates.masked_fill(~there, -torch.inf).argmax(1, keepdim=True)
    return Choice(ids, ids.gather(1, best)[:, 0])


def agreement(mine: Choice, theirs: Choice, keep: Tensor, experts: int) -> Tensor:
    """Over tokens that chose an expert in the original: how many, of how many of them nothing of that choice is kept,
    of how many both have the same first one, and the sum of shares of that choice which both have."""
    stays = torch.zeros(experts + 1, dtype=torch.bool)
    stays[keep] = True
    there = theirs.ids >= 0
    count = there.sum(1)
    some = count > 0
    both = ((theirs.ids[:, :, None] == mine.ids[:, None]).any(2) & there).sum(1)
    lost = ~(stays[theirs.ids] & there).any(1) & some
    same = (mine.first == theirs.first) & some
    shares = (both.double() / count.clamp(min=1)).sum()
    return torch.stack([some.sum().double(), lost.sum().double(), same.sum().double(), shares])


def layer_figures(stream: Tensor | None, choice: Tensor | None, plan: Plan | None, key: str | None) -> LayerFigures:
    """What sums of `apart` and of `Watch.taken` come to; plan None: the original, key None: a layer without experts."""
    error = cosine = load = None
    shares: Sequence[float | None] = (None, None, None)
    if stream is not None:
        rows, squares, energy, cosines = stream.tolist()
        error, cosine = sqrt(squares / energy) if energy else None, cosines / rows
    if choice is not None:
        tokens, *sums = choice[:AGREEING].tolist()
        shares = [each / tokens for each in sums] if tokens else shares
        counts = choice[AGREEING:]
        if plan is not None and key is not None:
            counts = counts[list(plan.layers[key].keep)]
        load = float(counts.max() * len(counts) / counts.sum()) if float(counts.sum()) else None
    return LayerFigures(error, cosine, shares[0], load, *shares[1:])


def mean_layers(row: Row) -> dict[str, LayerFigures]:
    """Of each layer the means over domains, each counting the same; None where one is not known."""
    by_key: dict[str, list[LayerFigures]] = {}
    for loss in row.values():
        for key, each in (loss.layers or {}).items():
            by_key.setdefault(key, []).append(each)
    return {key: LayerFigures(*map(_mean, zip(*map(astuple, some), strict=True))) for key, some in by_key.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
