"""Grouping routed slots by expert."""

from __future__ import annotations

from torch import Tensor

from moekern.kernels.checks import BOOL, INTS, check_tensors
from moekern.kernels.dispatch import backend_for, implementation


def sort_by_expert(
    topk_idx: Tensor, num_experts: int, mask: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(order [T·K] int64, offsets [E+1] int64): every flat slot t·K + k in expert order, rising within an expert.

    topk_idx [T, K] is int64 or int32. Expert e's slots are order[offsets[e]:offsets[e+1]]; the first N = offsets[E]
    entries of order are the filled slots. Behind them, so that every entry is a slot and no size depends on values,
    come the slots that have no expert, rising too: those with an id outside [0, E), and with mask [T] bool all slots of
    a token that is not kept. Where there may be some, cut order to N (on a GPU that waits for the device), or carry
    rows for all of it: combine_and_measure reads none from N on.

    A pure function of its arguments, whatever the backend and the number of threads.
    Raises ValueError for a wrong argument, NotImplementedError for a backend that has no such op.
    """
    op = "sort_by_expert"
    if num_experts < 0:
        raise ValueError(f"[{op}] num_experts: expected 0 or more, got {num_experts}")
    check_tensors(op, {"topk_idx": (topk_idx, "T K", INTS), "mask": (mask, "T", BOOL)})
    run = implementation(backend_for(op, topk_idx.device.type, backend), op)
    order, offsets = run(topk_idx, num_experts, mask)
    return order, offsets
