"""Where the measured sums of one run are kept: per layer and domain."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moekern import kernels
from moekern.errors import InputError
from moekern.measurement.batch import Seen
from moekern.measurement.tiers import add_outliers, add_reap, chosen_sets
from moekern.statistics.layer import LayerStatistics, merge_rows

RECORDED = ("dimensions", "vocabulary", "coalitions", "reap")  # tiers of one forward pass


@dataclass
class Recorder:
    """Adds what the probes see to the sums of the current domain.

    `mask` [T] bool says which tokens of the batch in flight count; None counts all. `token_ids` [T] are the batch's.
    """

    tiers: Collection[str] = ("dimensions",)  # beside the routed one: of RECORDED
    backend: str | None = None
    domain: str = "default"
    mask: Tensor | None = None
    token_ids: Tensor | None = None
    words: int = 0  # 64-bit words of a vocabulary
    sums: dict[str, dict[str, LayerStatistics]] = field(default_factory=dict)
    empty_slots: dict[tuple[str, str], int] = field(default_factory=dict)
    coalitions: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)  # of batches, not yet united

    def measure(self, layer: str, score: str, seen: Seen) -> Tensor:
        """Combine the experts' outputs into [T, H] and add the batch to the sums of `layer`."""
        ids, gates, routed = seen.ids, seen.gates, seen.routed
        E = len(routed.offsets) - 1
        mask = self._mask(len(ids))
        sums = self._sums(layer, E, seen.y)
        if routed.order.numel() < ids.numel():
            counted = ids if mask is None else ids[mask]
            key = (layer, self.domain)
            empty = int(((counted < 0) | (counted >= E)).sum())
            self.empty_slots[key] = self.empty_slots.get(key, 0) + empty
        logits = None if seen.logits is None else seen.logits[:, :E].contiguous()
        kernels.router_stats(
            logits, ids, gates, mask, sums.views(kernels.RouterSums), score=score, backend=self.backend
        )
        self._tiers(layer, replace(seen, logits=logits), mask, sums)
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

    def _tiers(self, layer: str, seen: Seen, mask: Tensor | None, sums: LayerStatistics) -> None:
        if "vocabulary" in self.tiers:
            if self.token_ids is None or len(self.token_ids) != len(seen.ids):
                raise InputError("--tier vocabulary: the model was not given input_ids, one for each token")
            kernels.vocabulary(self.token_ids, seen.ids, mask, sums.vocabulary, backend=self.backend)
        if "coalitions" in self.tiers:
            found = chosen_sets(seen.ids, mask, sums.num_experts)
            self.coalitions.setdefault((layer, self.domain), []).append(found)
        if "reap" in self.tiers:
            add_reap(seen, mask, sums)

    def finish(self, layer: str) -> None:
        """Unite what was kept apart while batches came in."""
        for domain, sums in self.sums.get(layer, {}).items():
            parts = self.coalitions.pop((layer, domain), [])
            if parts:
                united = merge_rows(sums.coalitions, torch.cat(parts))
                self.sums[layer][domain] = replace(sums, coalitions=united)

    def check(self, layer: str, top_k: int) -> None:
        """Assert that every counted token of a finished layer was seen with exactly K slots."""
        for domain, s in self.sums.get(layer, {}).items():
            slots = int(s.count.sum()) + self.empty_slots.get((layer, domain), 0)
            tokens = int(s.tokens)
            if slots != tokens * top_k:
                raise RuntimeError(
                    f"layer {layer}, domain {domain}: {slots} routed slots for {tokens} tokens x top-{top_k}; "
                    "the statistics would be wrong"
                )

    def _mask(self, tokens: int) -> Tensor | None:
        if self.mask is not None and len(self.mask) != tokens:
            raise ValueError(f"attention_mask: expected {tokens} tokens as the router sees, got {len(self.mask)}")
        return self.mask

    def _sums(self, layer: str, num_experts: int, y: Tensor) -> LayerStatistics:
        domains = self.sums.setdefault(layer, {})
        if self.domain not in domains:
            H = y.shape[1]
            domains[self.domain] = LayerStatistics.zeros(
                num_experts,
                H if "dimensions" in self.tiers else 0,
                y.device,
                tiers=self.tiers,
                hidden=H,
                words=self.words,
            )
        return domains[self.domain]


@dataclass
class OutlierRecorder(Recorder):
    """A second pass over the same data: counts outliers by the sums of the `first`. Its own sums are not kept."""

    first: dict[str, dict[str, LayerStatistics]] = field(default_factory=dict)

    def measure(self, layer: str, score: str, seen: Seen) -> Tensor:
        first = self.first[layer][self.domain]
        add_outliers(seen, self._mask(len(seen.ids)), first, first.outlier_sum)
        return super().measure(layer, score, seen)

    def finish(self, layer: str) -> None:
        """Raises RuntimeError when the model did not route as in the first pass."""
        for domain, sums in self.sums.pop(layer, {}).items():
            if not torch.equal(sums.count, self.first[layer][domain].count):
                raise RuntimeError(f"layer {layer}, domain {domain}: the second pass did not route like the first")
