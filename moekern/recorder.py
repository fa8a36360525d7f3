"""Where the measured sums of one run are kept: per layer and domain."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moekern import kernels
from moekern.statistics import LayerStatistics


@dataclass(frozen=True)
class Routed:
    """The routed rows of one batch, grouped by expert: row n belongs to flat slot order[n] = t * K + k."""

    order: Tensor  # [N] int64
    offsets: Tensor  # [E + 1] int64


def route(topk_idx: Tensor, num_experts: int, *, empty_slots: bool, backend: str | None = None) -> Routed:
    """Group the slots of topk_idx [T, K] by expert, stably. Where slots may be empty, these get no row."""
    order, offsets = kernels.sort_by_expert(topk_idx, num_experts, backend=backend)
    return Routed(order[: int(offsets[-1])] if empty_slots else order, offsets)


@dataclass
class Recorder:
    """Adds what the seam sees to the sums of the current domain.

    `mask` [T] bool says which tokens of the batch in flight count; None counts all.
    """

    dimensions: bool = True  # keep the per-dimension sums [E, H]
    backend: str | None = None
    domain: str = "default"
    mask: Tensor | None = None
    sums: dict[str, dict[str, LayerStatistics]] = field(default_factory=dict)
    empty_slots: dict[tuple[str, str], int] = field(default_factory=dict)

    def measure(
        self,
        layer: str,
        score: str,
        logits: Tensor | None,
        topk_idx: Tensor,
        topk_weight: Tensor,
        y: Tensor,
        routed: Routed,
        *,
        gates_applied: bool = False,
    ) -> Tensor:
        """Combine expert outputs y [N, H] into [T, H] and add the batch to the sums of `layer`.

        With `gates_applied`, y already holds gate-weighted contributions (Llama 4 scales the expert's input).
        """
        num_experts = len(routed.offsets) - 1
        mask = self._mask(len(topk_idx))
        sums = self._sums(layer, num_experts, y)
        if routed.order.numel() < topk_idx.numel():
            counted = topk_idx if mask is None else topk_idx[mask]
            key = (layer, self.domain)
            empty = int(((counted < 0) | (counted >= num_experts)).sum())
            self.empty_slots[key] = self.empty_slots.get(key, 0) + empty
        kernels.router_stats(
            None if logits is None else logits[:, :num_experts].contiguous(),
            topk_idx,
            topk_weight,
            mask,
            sums.views(kernels.RouterSums),
            score=score,
            backend=self.backend,
        )
        return kernels.combine_and_measure(
            y,
            torch.ones_like(topk_weight) if gates_applied else topk_weight,
            topk_idx,
            routed.order,
            routed.offsets,
            mask,
            sums.views(kernels.ExpertSums),
            backend=self.backend,
        )

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
            hidden = y.shape[1] if self.dimensions else 0
            domains[self.domain] = LayerStatistics.zeros(num_experts, hidden, y.device)
        return domains[self.domain]
