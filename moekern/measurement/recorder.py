"""Where the measured sums of a pass are kept while their layer runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moekern import kernels
from moekern.errors import InputError
from moekern.measurement.batch import BatchContext, Seen
from moekern.measurement.tiers import TABLE, add_outliers, chosen_sets
from moekern.model.finite import all_finite, expert_list, wrong_experts
from moekern.statistics.layer import LayerStatistics, merge_rows

MASKED = -1e4  # a logit that can be multiplied and added, and whose score is 0 in every type


@dataclass
class Recorder:
    """Adds what the probes see of a batch to the sums of its layer and domain."""

    score: str  # what a router's logit becomes
    tiers: Collection[str] = ()  # beside the routed one
    backend: str | None = None
    words: int = 0  # 64-bit words of a vocabulary
    sums: dict[str, dict[str, LayerStatistics]] = field(default_factory=dict)
    empty_slots: dict[tuple[str, str], int] = field(default_factory=dict)
    coalitions: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)  # of batches, not yet united

    def measure(self, layer: str, seen: Seen, context: BatchContext) -> Tensor:
        """Combine the experts' outputs into [T, H] and add them to the sums of `layer`."""
        ids, gates, routed, E = seen.ids, seen.gates, seen.routed, seen.num_experts
        mask = _mask(context, len(ids))
        sums = self._sums(layer, context.domain, E, seen.y)
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
            self.coalitions.setdefault((layer, context.domain), []).append(chosen_sets(ids, mask, E))
        for tier in self.tiers:
            add = TABLE[tier].add
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

    def unite(self, layer: str) -> dict[str, LayerStatistics]:
        """Domain -> the sums so far, with the coalitions that were kept apart while batches came in."""
        domains = self.sums.get(layer, {})
        for domain, sums in domains.items():
            parts = self.coalitions.pop((layer, domain), [])
            if parts:
                domains[domain] = replace(sums, coalitions=merge_rows(sums.coalitions, torch.cat(parts)))
        return domains

    def overflowing(self, layer: str) -> list[int]:
        """The experts of a layer whose outputs are not finite, where their inputs are."""
        found: set[int] = set()
        for sums in self.sums.get(layer, {}).values():
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
        self.unite(layer)
        taken = {}
        for domain, sums in self.sums.pop(layer, {}).items():
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
        return taken

    def _sums(self, layer: str, domain: str, num_experts: int, y: Tensor) -> LayerStatistics:
        domains = self.sums.setdefault(layer, {})
        if domain not in domains:
            H = y.shape[1]
            domains[domain] = LayerStatistics.zeros(
                num_experts,
                H if "dimensions" in self.tiers else 0,
                y.device,
                tiers=self.tiers,
                hidden=H,
                words=self.words,
            )
        return domains[domain]


@dataclass
class OutlierRecorder(Recorder):
    """A second pass over the same data: counts outliers by the sums of the `first`. Its own sums are not kept."""

    first: dict[str, dict[str, LayerStatistics]] = field(default_factory=dict)  # of the layer that runs

    def measure(self, layer: str, seen: Seen, context: BatchContext) -> Tensor:
        first = self.first[layer][context.domain]
        add_outliers(seen, _mask(context, len(seen.ids)), first, first.outlier_sum)
        return super().measure(layer, seen, context)

    def take(
        self, layer: str, top_k: int, blamed: Callable[[], str | None] = lambda: None
    ) -> dict[str, LayerStatistics]:
        """The first pass's sums with the outliers. Raises RuntimeError when the model did not route as it did then."""
        again, first = super().take(layer, top_k, blamed), self.first.pop(layer)
        for domain, sums in again.items():
            if not torch.equal(sums.count, first[domain].count.cpu()):
                raise RuntimeError(f"layer {layer}, domain {domain}: the second pass did not route like the first")
        return first


def _experts_of(sums: LayerStatistics, problem: str) -> str:
    """Of which experts the field at fault is not finite."""
    value = getattr(sums, problem.partition(":")[0])
    if all_finite(value) or len(value) != sums.num_experts:
        return ""
    return f" for {expert_list(wrong_experts(value))}"


def _added_up(logits: Tensor) -> Tensor:
    """Logits [T, E] in which -inf, by which a router masks an expert, is MASKED."""
    return logits.masked_fill(logits == -torch.inf, MASKED)


def _mask(context: BatchContext, tokens: int) -> Tensor | None:
    if context.mask is not None and len(context.mask) != tokens:
        raise ValueError(f"attention_mask: expected {tokens} tokens as the router sees, got {len(context.mask)}")
    return context.mask
