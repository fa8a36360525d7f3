"""The routed rows of one batch in one layer: how they are grouped, and all that was seen of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moekern import kernels

Outputs = Callable[[Tensor, Tensor], Tensor]


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
    gate-weighted contributions (Llama 4 scales the expert's input).
    """

    logits: Tensor | None  # [T, E or more]
    ids: Tensor  # [T, K]; below 0 or from E on where a slot is empty
    gates: Tensor  # [T, K]
    routed: Routed
    y: Tensor  # [N, H]
    outputs: Outputs
    residual: Tensor | None = None  # [T, H]
    gates_applied: bool = False


def route(topk_idx: Tensor, num_experts: int, *, empty_slots: bool, backend: str | None = None) -> Routed:
    """Group the slots of topk_idx [T, K] by expert, stably. Where slots may be empty, these get no row."""
    order, offsets = kernels.sort_by_expert(topk_idx, num_experts, backend=backend)
    return Routed(order[: int(offsets[-1])] if empty_slots else order, offsets)
