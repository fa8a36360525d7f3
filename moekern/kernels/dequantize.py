"""Stored weights as numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.kernels.checks import FLOATS, short
from moekern.kernels.dispatch import backend_for, implementation
from moekern.kernels.quantised import Quantised


def dequantize(weight: Quantised, dtype: torch.dtype = torch.bfloat16, *, backend: str | None = None) -> Tensor:
    """The dense weight, contiguous, [R, C] or [E, R, C], in float32, bfloat16 or float16.

    (value - zero) · scale is rounded to float32 after each of the two operations, then once to dtype: the bits are the
    same in every backend. Codes that are infinite or NaN, and products too large for dtype, stay so.
    Raises ValueError for a wrong argument, NotImplementedError for a backend that has no such op.
    """
    op = "dequantize"
    if not isinstance(weight, Quantised):
        raise ValueError(f"[{op}] weight: expected a Quantised, got {type(weight).__name__}")
    if dtype not in FLOATS:
        raise ValueError(f"[{op}] dtype: expected {' or '.join(map(short, FLOATS))}, got {short(dtype)}")
    name = backend_for(op, weight.codes.device.type, backend)
    if not weight.transposed:
        dense: Tensor = implementation(name, "dequantize")(weight, dtype)
        return dense if weight.stacked else dense[0]
    # The result lies below what it is made from, which then leaves no hole in the heap.
    dense = torch.empty(len(weight.codes), weight.columns, weight.rows, dtype=dtype, device=weight.codes.device)
    # One expert at a time: torch copies a transposed matrix in blocks, but not a stack of them.
    for to, matrix in zip(dense, implementation(name, "dequantize")(weight, dtype), strict=True):
        to.copy_(matrix.T)
    return dense if weight.stacked else dense[0]
