"""Where the measured sums of a pass are kept while their layer runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moekern import kernels
from moekern.errors import InputError
from moekern.measurement.batch import BatchContext, Routed, Seen
from moekern.measurement.tiers import TABLE, add_outliers, by_logits, chosen_sets, rows_of
from moekern.model.finite import all_finite, expert_list, wrong_experts
from moekern.statistics.folding import Folding
from moekern.statistics.layer import LayerStatistics
from moekern.statistics.merges import merge_rows
from moekern.team import Team

MASKED = -1e4  # a logit that can be multiplied and added, and whose score is 0 in every type


@dataclass(frozen=True)
class Left:
    """What one process has measured of a layer, for another one to fold."""

    segments: Mapping[tuple[str, int], LayerStatistics]  # (domain, segment) -> sums
    empty_slots: Mapping[str, int]  # domain -> counted slots without an expert


@dataclass
class Recorder:
    """Adds what the probes see of a batch to the sums of its layer and domain.

    At most three copies of a domain's sums are held: the segment at work, and the two that segments before it add up
    to (see `Folding`); of other domains one.
    """

    score: str  # what a router's logit becomes
    tiers: Collection[str] = ()  # beside the routed one
    backend: str | None = None
    words: int = 0  # 64-bit words of a vocabulary
    apart: bool = False  # hold every segment of a layer, for `leave`
    sums: dict[str, dict[str, LayerStatistics]] = field(default_factory=dict)  # layer -> domain -> the whole
    empty_slots: dict[tuple[str, str], int] = field(default_factory=dict)
    segments: dict[str, dict[tuple[str, int], LayerStatistics]] = field(default_factory=dict)  # that batches add to
    coalitions: dict[str, list[Tensor]] = field(default_factory=dict)  # of the segment's batches, not yet united
    folds: dict[str, dict[str, Folding]] = field(default_factory=dict)  # layer -> domain -> its segments so far

    def measure(self, layer: str, seen: Seen, context: BatchContext) -> Tensor:
        """Combine the experts' outputs into [T, H] and add them to the sums of `layer`."""
        ids, gates, routed, E = seen.ids, seen.gates, seen.routed, seen.num_experts
        mask = _mask(context, len(ids))
        sums = self._segment(layer, context, E, seen.y)
        if routed.order.numel() < ids.numel():
            counted = ids if mask is None else ids[mask]
            key = (layer, context.domain)
            empty = int(((counted < 0) | (counted >= E)).sum())
            self.empty_slots[key] = self.empty_slots.get(key, 0) + empty
        logits = None if seen.logits is None else _added_up(seen.logits[:, :E].contiguous())
        kernels.router_stats(
            logits, ids, gates, mask, sums.views(kernels.RouterSums), score=self.score, backend=self.backend
        )
        if "coalitions" in self.tiers:
            self.coalitions.setdefault(layer, []).append(chosen_sets(ids, mask, E))
        for add in dict.fromkeys(TABLE[tier].add for tier in self.tiers):  # two tiers may be one read of the rows
            if add is not None:
                add(replace(seen, logits=logits), context, sums, self.backend)
        return kernels.combine_and_measure(
            seen.y,
            torch.ones_like(gates) if seen.gates_applied else gates,
            ids,
            routed.order,
            routed.offsets,
            mask,
            sums.views(kernels.ExpertSums),
            residual=seen.residual,
            backend=self.backend,
        )

    def further(
        self, logits: Tensor | None, ids: Tensor, routed: Routed, context: BatchContext
    ) -> list[tuple[Tensor, Tensor]]:
        """What `measure` will ask of `Seen.outputs`: tokens and offsets of rows that are not the model's own."""
        if "reap" not in self.tiers or logits is None:
            return []
        E = len(routed.offsets) - 1
        _, missing = by_logits(_added_up(logits[:, :E].contiguous()), ids, routed, _mask(context, len(ids)))
        return [rows_of(missing)] if bool(missing.any()) else []

    @property
    def layers(self) -> list[str]:
        """The layers that hold sums here."""
        return list(dict.fromkeys((*self.sums, *self.folds, *self.segments)))

    def held(self, layer: str, context: BatchContext) -> LayerStatistics:
        """The sums of the segment at work, to which a batch of this context was the last to be added."""
        return self.segments[layer][context.domain, context.segment]

    def unite(self, layer: str) -> dict[str, LayerStatistics]:
        """Domain -> the sums of all segments. The domain that was measured last takes no more batches."""
        self._fold(layer)
        del self.folds[layer]
        return self.sums[layer]

    def leave(self, layer: str) -> Left:
        """What this process, which holds segments apart, has measured of a layer; it holds it no longer."""
        self._unite_coalitions(layer)
        counted = {domain: n for (key, domain), n in self.empty_slots.items() if key == layer}
        for domain in counted:
            del self.empty_slots[layer, domain]
        return Left(self.segments.pop(layer, {}), counted)

    def join(self, layer: str, parts: Iterable[Left], *, in_order: bool = False) -> None:
        """As if all that other processes have measured of a layer had been measured here: the same bits.

        Each segment must be of one of them, whole. Parts that come `in_order`, domain by domain and their segments
        rising, are added up as they come; others are held.
        """
        for part in parts:
            self.segments.setdefault(layer, {}).update(part.segments)
            if in_order and part.segments:
                self._fold(layer, next(iter(part.segments))[0])
            for domain, n in part.empty_slots.items():
                self.empty_slots[layer, domain] = self.empty_slots.get((layer, domain), 0) + n

    def overflowing(self, layer: str) -> list[int]:
        """The experts of a layer whose outputs are not finite, where their inputs are."""
        found: set[int] = set()
        for sums in self._all(layer):
            if all_finite(sums.gate_sum) and all_finite(sums.entropy_sum):
                found |= set(wrong_experts(sums.norm_sum))
        return sorted(found)

    def take(
        self, layer: str, top_k: int, blamed: Callable[[], str | None] = lambda: None
    ) -> dict[str, LayerStatistics]:
        """Domain -> the finished layer's sums, on the CPU; they are held here no longer.

        Raises RuntimeError when a counted token was not seen with exactly K slots, and InputError for sums that are not
        finite: it says which weight is `blamed`.
        """
        taken = {}
        for domain, sums in self.unite(layer).items():
            s = taken[domain] = sums.to("cpu")
            slots = int(s.count.sum()) + self.empty_slots.pop((layer, domain), 0)
            if slots != int(s.tokens) * top_k:
                raise RuntimeError(
                    f"layer {layer}, domain {domain}: {slots} routed slots for {int(s.tokens)} tokens x top-{top_k}; "
                    "the statistics would be wrong"
                )
            problem = s.problem(top_k)
            if problem:
                reason = blamed() or "its numbers are infinite or too large to be added; try another type (--dtype)"
                raise InputError(f"layer {layer}, domain {domain}: {problem}{_experts_of(s, problem)}: {reason}")
        del self.sums[layer]
        return taken

    def _segment(self, layer: str, context: BatchContext, num_experts: int, y: Tensor) -> LayerStatistics:
        """The sums of the segment that a batch belongs to. A segment is whole when another one comes."""
        key = context.domain, context.segment
        held = self.segments.setdefault(layer, {})
        if key not in held:
            self._unite_coalitions(layer)
            if not self.apart:
                self._fold(layer, context.domain)
                held = self.segments.setdefault(layer, {})
            H = y.shape[1]
            held[key] = LayerStatistics.zeros(
                num_experts,
                H if "dimensions" in self.tiers else 0,
                y.device,
                tiers=self.tiers,
                hidden=H,
                words=self.words,
            )
        return held[key]

    def _unite_coalitions(self, layer: str) -> None:
        parts = self.coalitions.pop(layer, [])
        if parts:
            held = self.segments[layer]
            key, sums = next(reversed(held.items()))
            held[key] = replace(sums, coalitions=merge_rows(sums.coalitions, torch.cat(parts)))

    def _fold(self, layer: str, coming: str | None = None) -> None:
        """Add the segments that are held to those before them; a domain is whole when another one is `coming`."""
        self._unite_coalitions(layer)
        folds, whole = self.folds.pop(layer, {}), self.sums.setdefault(layer, {})
        held = self.segments.pop(layer, {})
        for domain, segment in sorted(held, key=lambda key: key[1]):
            if domain in whole:
                raise RuntimeError(f"layer {layer}: text of domain {domain} came after that of another one")
            folds.setdefault(domain, Folding()).add(segment, held[domain, segment])
        whole |= {domain: fold.total() for domain, fold in folds.items() if domain != coming}
        self.folds[layer] = {domain: fold for domain, fold in folds.items() if domain == coming}

    def _all(self, layer: str) -> list[LayerStatistics]:
        """All sums of a layer that are held."""
        halves = [half for fold in self.folds.get(layer, {}).values() for half in fold.halves if half is not None]
        return [*self.sums.get(layer, {}).values(), *halves, *self.segments.get(layer, {}).values()]


@dataclass
class CountingRecorder(Recorder):
    """Counts outliers beside all else, by the sums of a `first` pass over all text."""

    first: dict[str, dict[str, LayerStatistics]] = field(default_factory=dict)  # of the layer that runs

    def measure(self, layer: str, seen: Seen, context: BatchContext) -> Tensor:
        first = self.first[layer][context.domain]
        own = self._segment(layer, context, seen.num_experts, seen.y)
        add_outliers(seen, _mask(context, len(seen.ids)), first, own.outlier_sum)
        return super().measure(layer, seen, context)


@dataclass
class OutlierRecorder(CountingRecorder):
    """A second pass over the same data, whose own other sums are not kept."""

    def take(
        self, layer: str, top_k: int, blamed: Callable[[], str | None] = lambda: None
    ) -> dict[str, LayerStatistics]:
        """The first pass's sums with the outliers. Raises RuntimeError when the model did not route as it did then."""
        again, first = super().take(layer, top_k, blamed), self.first.pop(layer)
        for domain, sums in again.items():
            if not torch.equal(sums.count, first[domain].count.cpu()):
                raise RuntimeError(f"layer {layer}, domain {domain}: the second pass did not route like the first")
        return {domain: replace(first[domain], outlier_sum=sums.outlier_sum) for domain, sums in again.items()}


def _experts_of(sums: LayerStatistics, problem: str) -> str:
    """Of which experts the field at fault is not finite."""
    value = getattr(sums, problem.partition(":")[0])
    if all_finite(value) or len(value) != sums.num_experts:
        return ""
    return f" for {expert_list(wrong_experts(value))}"


def _added_up(logits: Tensor) -> Tensor:
    """Logits [T, E] in which -inf, by which a router masks an expert, is MASKED; on a CPU themselves where none is."""
    if logits.device.type == "cpu" and logits.numel() and bool(logits.amin() > -torch.inf):
        return logits  # one read and no copy; a GPU would be waited for
    return logits.masked_fill(logits == -torch.inf, MASKED)


def gathered(
    recorder: Recorder, layer: str, team: Team, owners: Mapping[tuple[str, int], int], device: torch.device
) -> None:
    """Rank 0 gets what all ranks have measured of a layer, a segment at a time and in order; the others lose it.

    `owners` say of every segment, domain by domain and rising, which rank has it.
    """
    left = recorder.leave(layer)
    counted = team.gather(left.empty_slots)
    for name, owner in owners.items():
        if team.rank == owner != 0:  # numpy's arrays travel much faster than torch's tensors
            team.send({field: value.cpu().numpy() for field, value in left.segments[name].tensors().items()})
        elif team.first:
            sums = left.segments[name] if owner == 0 else _received(team, owner).to(device)
            recorder.join(layer, [Left({name: sums}, {})], in_order=True)
    recorder.join(layer, [Left({}, each) for each in counted])


def _received(team: Team, rank: int) -> LayerStatistics:
    """A segment's sums, which that rank sends."""
    return LayerStatistics(**{field: torch.from_numpy(value) for field, value in team.receive(rank).items()})


def _mask(context: BatchContext, tokens: int) -> Tensor | None:
    if context.mask is not None and len(context.mask) != tokens:
        raise ValueError(f"attention_mask: expected {tokens} tokens as the router sees, got {len(context.mask)}")
    return context.mask
