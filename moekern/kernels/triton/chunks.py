"""Sums by expert without float atomics: programs sum chunks of rows that lie side by side, a second kernel the chunks.

A chunk is up to CHUNK rows of one expert, so a favourite is shared by many programs and every sum has one order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 256  # rows of one expert
TILE = 4096  # elements a program adds at a time


class Chunks(NamedTuple):
    offsets: Tensor  # [E + 1] int64  rows before each expert
    first: Tensor  # [E + 1] int64  chunks before each expert
    limit: int  # chunks there can be, whatever the offsets: a launch's size may not depend on their values

    @property
    def num_experts(self) -> int:
        return len(self.first) - 1

    @property
    def block(self) -> int:
        return triton.next_power_of_2(max(1, self.num_experts))


def chunks_of(offsets: Tensor, N: int, size: int = CHUNK) -> Chunks:
    """Chunks of rows grouped by expert. Offsets are clamped: wild ones give wrong sums, but no wild address."""
    offsets, limit = offsets.clamp(0, N), N // size + len(offsets) - 1
    counts = (offsets.diff() + (size - 1)).div(size, rounding_mode="floor")
    return Chunks(offsets, pad(counts.cumsum(0), (1, 0)).clamp_(0, limit), limit)


@triton.jit
def chunk_rows(offsets_ptr, first_ptr, E, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """This program's expert and rows [start, stop). Expert E, with no rows: there is no such chunk."""
    return rows_of(tl.program_id(0), offsets_ptr, first_ptr, E, CHUNK, BLOCK_E)


@triton.jit
def rows_of(chunk, offsets_ptr, first_ptr, E, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    x = tl.arange(0, BLOCK_E)
    ends = tl.load(first_ptr + 1 + x, mask=x < E, other=0x7FFFFFFF)
    e = tl.sum((ends <= chunk).to(tl.int32), 0)
    there = e < E
    start = tl.load(offsets_ptr + e) + (chunk - tl.load(first_ptr + e)) * CHUNK
    stop = tl.load(offsets_ptr + e + 1, mask=there, other=0)
    return e, start, tl.where(there, tl.minimum(start + CHUNK, stop), start)


@triton.jit
def add_chunks_kernel(partial_ptr, first_ptr, total_ptr, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """total[e] += partial[first[e]] + ... + partial[first[e + 1] - 1], columns side by side, in float64."""
    e = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((ROWS, BLOCK), 0, tl.float64)
    stop = tl.load(first_ptr + e + 1)
    for start in range(tl.load(first_ptr + e), stop, ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < stop)[:, None] & (column < C)[None, :]
        total += tl.load(partial_ptr + row[:, None] * C + column[None, :], mask=there, other=0.0).to(tl.float64)
    at = total_ptr + e * C + column
    tl.store(at, tl.load(at, mask=column < C) + tl.sum(total, 0), mask=column < C)


def add_chunks(partial: Tensor, first: Tensor, total: Tensor) -> Tensor:
    """Add each expert's chunks, partial [chunks, C], to its row of total [E, C] float64; returns total."""
    E, C = total.shape
    block = min(256, triton.next_power_of_2(max(1, C)))
    add_chunks_kernel[(E, triton.cdiv(C, block))](
        partial, first, total, C, ROWS=TILE // block, BLOCK=block, enable_fp_fusion=False
    )
    return total
