"""What changed experts put out, taken away from their tokens' residuals."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.kernels.checks import I64, check_distinct, check_grouped, check_tensors
from moekern.kernels.dispatch import backend_for, implementation

F32 = (torch.float32,)


def scatter_residual(
    r: Tensor, a: Tensor, delta: Tensor, tokens: Tensor, offsets: Tensor, *, backend: str | None = None
) -> None:
    """r[tokens] -= a @ delta, expert after expert, in place.

    r [T, H], a [N, M] and delta [E, M, H] (or [M, H] of one expert) are float32. a is grouped by expert: rows
    offsets[e]:offsets[e+1] are expert e's (offsets [E+1] int64) and meet delta[e]; row n is taken from row tokens[n] of
    r (tokens [N] int64). The tokens of one expert are distinct: a GPU does not check that, and gives no defined result
    where they are not. Rows from offsets[E] on are not read. No gradient passes.

    Products are summed in float32, one fused multiply-add after the other, over at most 256 channels; each such sum is
    subtracted from r in float32, in the channels' order. So a row is wrong by at most 256·2⁻²⁴·Σ|aδ|, and by 2⁻²⁴ of
    the largest value that it goes through for each expert of its token and each 256 channels.
    Raises ValueError for a wrong argument (on a CPU also for wrong values in offsets and tokens), NotImplementedError
    for a backend that has no such op.
    """
    op = "scatter_residual"
    if isinstance(delta, Tensor) and delta.ndim == 2:
        delta = delta[None]
    sizes = check_tensors(op, {
        "r": (r, "T H", F32),
        "offsets": (offsets, "E+1", I64),
        "a": (a, "N M", F32),
        "delta": (delta, "E M H", F32),
        "tokens": (tokens, "N", I64),
    })  # fmt: skip
    name = backend_for(op, r.device.type, backend)
    if name != "native" and r.device.type == "cpu":
        check_grouped(op, offsets, sizes["N"], tokens, sizes["T"])
        check_distinct(op, offsets, tokens, sizes["T"])
    implementation(name, op)(r.detach(), a.detach(), delta.detach(), tokens, offsets)
