"""gated_energy: a program has some channels of a chunk of one expert's rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekern.kernels.triton.chunks import CHUNK, add_chunks, chunk_rows, chunks_of
from moekern.kernels.triton.floats import exponential

COLUMNS = 128  # channels of a program
ROWS = 16  # that it computes at a time


@triton.jit
def bounded_exponential(x):
    """exp(x), at the ends of exponential's range beyond them; a NaN stays one."""
    x = tl.where(x > 87.0, 87.0, x)
    return exponential(tl.where(x < -87.0, -87.0, x))


@triton.jit
def complementary_error(z):
    """erfc(z) for z >= 0, operation by operation that of csrc/activations.h."""
    t = tl.div_rn(tl.full(z.shape, 1, tl.float32), z * 0.5 + 1.0)
    p = t * 0.0122838765 + -0.123254687
    p = p * t + 0.428928405
    p = p * t + -0.670022488
    p = p * t + 0.421274275
    p = p * t + -0.0983176306
    p = p * t + 0.225541845
    p = p * t + 0.238644838
    p = p * t + 0.282857031
    p = p * t + 0.282064497
    return p * t * bounded_exponential(-z * z)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """As csrc/activations.h computes it, to the last bit."""
    if ACTIVATION == "silu":
        y = tl.div_rn(x, bounded_exponential(-x) + 1.0)
    elif ACTIVATION == "gelu":
        z = x * 0.707106781
        tail = complementary_error(tl.where(z < 0.0, -z, z)) * 0.5
        y = x * tl.where(z < 0.0, tail, 1.0 - tail)
    elif ACTIVATION == "gelu_pytorch_tanh":
        y = tl.div_rn(x, bounded_exponential((x + x * 0.044715 * x * x) * -1.59576912) + 1.0)
    else:
        y = x
    return y


@triton.jit
def energy_kernel(
    x_ptr, gates_ptr, offsets_ptr, first_ptr, mask_ptr, out_ptr, partial_ptr, M, W, E,
    ACTIVATION: tl.constexpr, HALVES: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    e, first, stop = chunk_rows(offsets_ptr, first_ptr, E, CHUNK, BLOCK_E)
    if e < E:
        i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        sum = tl.full((ROWS, COLUMNS), 0, tl.float32)
        for start in range(first, stop, ROWS):
            n = start + tl.arange(0, ROWS)
            there = (n < stop)[:, None] & (i < M)[None, :]
            at = x_ptr + n[:, None] * W + i[None, :]
            v = activated(tl.load(at, mask=there, other=0.0).to(tl.float32), ACTIVATION)
            if HALVES:
                v = v * tl.load(at + M, mask=there, other=0.0).to(tl.float32)
            v = v * tl.load(gates_ptr + n, mask=n < stop, other=0.0).to(tl.float32)[:, None]
            tl.store(out_ptr + n[:, None] * M + i[None, :], v, mask=there)
            if mask_ptr is not None:
                v = tl.where((tl.load(mask_ptr + n, mask=n < stop, other=0) != 0)[:, None], v, 0.0)
            sum += v * v
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * M + i, tl.sum(sum, 0), mask=i < M)


def gated_energy(
    rows: Tensor, gates: Tensor, offsets: Tensor, mask: Tensor | None, energy: Tensor, *, activation: str | None
) -> Tensor:
    (N, W), (E, M) = rows.shape, energy.shape
    out = rows.new_zeros(N, M, dtype=torch.float32)
    if N * E * M == 0:
        return out
    chunks = chunks_of(offsets, N)
    partial = out.new_empty(chunks.limit, M)
    energy_kernel[(chunks.limit, triton.cdiv(M, COLUMNS))](
        rows, gates, chunks.offsets, chunks.first, mask, out, partial, M, W, E, ACTIVATION=activation, HALVES=W != M,
        CHUNK=CHUNK, ROWS=ROWS, COLUMNS=COLUMNS, BLOCK_E=chunks.block, enable_fp_fusion=False,
    )  # fmt: skip
    add_chunks(partial, chunks.first, energy)
    return out
