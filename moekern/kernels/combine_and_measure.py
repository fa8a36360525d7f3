"""The measuring combine: outputs of the routed rows into one, and their sums."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.kernels.checks import BOOL, FLOATS, I64, INTS, check_tensors
from moekern.kernels.dispatch import backend_for, implementation
from moekern.kernels.sums import ExpertSums, as_arguments


def combine_and_measure(
    y: Tensor,
    topk_weight: Tensor,
    topk_idx: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    sums: ExpertSums,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Σₖ gate·y for each token, [T, H]; the rows' norms, pairs and dimensions are added to the sums in place.

    y [N, H] (float32, bfloat16 or float16) holds expert outputs grouped by expert: rows offsets[e]:offsets[e+1] are
    expert e's. order [N] int64 names the flat slot t·K + k of each row, offsets is [E+1] int64: what sort_by_expert
    returns. topk_weight and topk_idx are [T, K] as for router_stats. Every filled slot has one row, empty slots have
    none; rows and entries of order from offsets[E] on are not read. All tokens are combined; mask [T] bool keeps those
    that the sums count. No gradient passes.

    residual [T, H], of y's dtype, is the stream h that the layer's output is added to: residual_sum is EASY-EP's
    importance of an expert (arXiv 2504.06792), weighing a token by how far `out`, as returned, turns h. The cosine with
    a zero vector is 0. Without it neither residual_sum nor residual_tokens is added to.

    The output is rounded to float32 after each product and each sum, in slot order, then once to y's dtype: its bits
    are the same in every backend. A row's squares are summed in float32 (a norm above 1e19 is infinite, one below
    1e-23 zero), rows in float64; sums of a dimension in float32 over at most 256 rows and in float64 across; <h, h>,
    <h, out> and <out, out> in float32, and 1 - cos in float64 from their determinant, <h, h><out, out> - <h, out>²,
    so that small turns keep their digits; always in the same order.
    Raises ValueError for a wrong argument (on a CPU also for wrong values in order and offsets), NotImplementedError
    for a backend that has no such op.
    """
    op = "combine_and_measure"
    check_tensors(op, {
        "y": (y, "N H", FLOATS),
        **as_arguments(ExpertSums, sums),
        "offsets": (offsets, "E+1", I64),
        "order": (order, "N", I64),
        "topk_idx": (topk_idx, "T K", INTS),
        "topk_weight": (topk_weight, "T K", FLOATS),
        "mask": (mask, "T", BOOL),
        "residual": (residual, "T H", (y.dtype,) if isinstance(y, Tensor) else FLOATS),
    })  # fmt: skip
    name = backend_for(op, y.device.type, backend)
    if name != "native" and y.device.type == "cpu":
        check_rows(op, topk_idx, order, offsets)
    run = implementation(name, op)
    h = None if residual is None else residual.detach()
    out: Tensor = run(y.detach(), topk_weight.detach(), topk_idx, order, offsets, mask, h, sums)
    return out


def check_rows(op: str, topk_idx: Tensor, order: Tensor, offsets: Tensor) -> None:
    """Every filled slot must have exactly one row, and the rows must be grouped by expert.

    Reads values, so a call on a GPU would wait for the device: CPU tensors only.
    """
    E, idx = len(offsets) - 1, topk_idx.reshape(-1).long()
    if offsets[0] != 0 or offsets[-1] > len(order) or (offsets.diff() < 0).any():
        raise ValueError(f"[{op}] offsets: expected offsets rising from 0 to at most {len(order)}")
    N = int(offsets[-1])
    order, expert = order[:N], torch.repeat_interleave(torch.arange(E), offsets.diff())
    inside = (order >= 0) & (order < len(idx))
    wrong = ~inside
    if len(idx):
        slot = order.where(inside, 0)
        first = torch.full_like(idx, N).scatter_reduce(0, slot, torch.arange(N), "amin")
        wrong |= (idx[slot] != expert) | (first[slot] != torch.arange(N))
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ValueError(
            f"[{op}] order: expected each slot of expert {int(expert[n])} once, got slot {int(order[n])} in row {n}"
        )
    filled = int(((idx >= 0) & (idx < E)).sum())
    if filled != N:
        raise ValueError(f"[{op}] offsets: expected a row for each of {filled} slots, got {N}")
