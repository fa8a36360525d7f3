"""gated_energy: a program has some channels of a chunk of one expert's rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekern.kernels.triton.chunks import CHUNK, add_chunks, chunk_rows, chunks_of

COLUMNS = 128  # channels of a program
ROWS = 16  # that it computes at a time


@triton.jit
def energy_kernel(
    x_ptr, gates_ptr, offsets_ptr, first_ptr, mask_ptr, out_ptr, partial_ptr, M, E,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    e, first, stop = chunk_rows(offsets_ptr, first_ptr, E, CHUNK, BLOCK_E)
    if e < E:
        i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        sum = tl.full((ROWS, COLUMNS), 0, tl.float32)
        for start in range(first, stop, ROWS):
            n = start + tl.arange(0, ROWS)
            there = (n < stop)[:, None] & (i < M)[None, :]
            v = tl.load(x_ptr + n[:, None] * M + i[None, :], mask=there, other=0.0).to(tl.float32)
            v = v * tl.load(gates_ptr + n, mask=n < stop, other=0.0).to(tl.float32)[:, None]
            tl.store(out_ptr + n[:, None] * M + i[None, :], v, mask=there)
            if mask_ptr is not None:
                v = tl.where((tl.load(mask_ptr + n, mask=n < stop, other=0) != 0)[:, None], v, 0.0)
            sum += v * v
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * M + i, tl.sum(sum, 0), mask=i < M)


def gated_energy(rows: Tensor, gates: Tensor, offsets: Tensor, mask: Tensor | None, energy: Tensor) -> Tensor:
    N, (E, M) = len(rows), energy.shape
    out = rows.new_zeros(N, M, dtype=torch.float32)
    if N * E * M == 0:
        return out
    chunks = chunks_of(offsets, N)
    partial = out.new_empty(chunks.limit, M)
    energy_kernel[(chunks.limit, triton.cdiv(M, COLUMNS))](
        rows, gates, chunks.offsets, chunks.first, mask, out, partial, M, E,
        CHUNK=CHUNK, ROWS=ROWS, COLUMNS=COLUMNS, BLOCK_E=chunks.block, enable_fp_fusion=False,
    )  # fmt: skip
    add_chunks(partial, chunks.first, energy)
    return out
