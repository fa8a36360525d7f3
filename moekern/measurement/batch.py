"""One batch in one layer: what the pass knows of it, how its rows are grouped by expert, and what was seen of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from moekern import kernels
from moekern.model.experts import Outputs


@dataclass(frozen=True)
class BatchContext:
    """What the pass knows of the batch that goes through the model: B sequences of S tokens, T = B x S."""

    domain: str
    shape: tuple[int, int]  # B, S
    mask: Tensor | None = None  # [T] bool: the tokens that count; None: all
    token_ids: Tensor | None = None  # [T]
    sample: Tensor | None = None  # flat positions of the tokens that are replayed
    segment: int = 0  # of its domain; see data.batches.segment_of


@dataclass
class InFlight:
    """Which batch goes through the model. The pass says it, around every stretch of the batch's computation."""

    context: BatchContext | None = None

    @contextmanager
    def batch(self, context: BatchContext) -> Iterator[None]:
        """What is seen while the context is open belongs to this batch."""
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before


@dataclass(frozen=True)
class Routed:
    """The routed rows of one batch, grouped by expert: row n belongs to flat slot order[n] = t * K + k."""

    order: Tensor  # [N] int64
    offsets: Tensor  # [E + 1] int64


@dataclass(frozen=True)
class Seen:
    """What was seen of one batch in one layer: T tokens, K slots, N routed rows.

    `outputs(tokens [M], offsets [E + 1])` runs any experts on any tokens: row n is of token tokens[n], and rows
    offsets[e]:offsets[e + 1] are expert e's; [M, H] before the gate. With `gates_applied`, outputs already are
    gate-weighted contributions (Llama 4 scales the expert's input). `gain` [E] is a number of each expert that gates
    hold beside the router's weights (Gemma 4).
    """

    logits: Tensor | None  # [T, E or more]
    ids: Tensor  # [T, K]; below 0 or from E on where a slot is empty
    gates: Tensor  # [T, K]
    routed: Routed
    y: Tensor  # [N, H]
    outputs: Outputs
    residual: Tensor | None = None  # [T, H]
    gates_applied: bool = False
    gain: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.routed.offsets) - 1


def route(topk_idx: Tensor, num_experts: int, *, empty_slots: bool, backend: str | None = None) -> Routed:
    """Group the slots of topk_idx [T, K] by expert, stably. Where slots may be empty, these get no row."""
    order, offsets = kernels.sort_by_expert(topk_idx, num_experts, backend=backend)
    return Routed(order[: int(offsets[-1])] if empty_slots else order, offsets)
