"""scatter_residual: one launch an expert, so that they follow one another."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # rows, times as many columns
CHUNK = 256  # channels whose products are summed in float32
DEPTH = 32  # channels that are multiplied at a time
ROW_PROGRAMS = 128  # that share an expert's tiles of rows, at most


@triton.jit(do_not_specialize=["T", "row_programs"])
def subtract_kernel(
    r_ptr, a_ptr, delta_ptr, tokens_ptr, offsets_ptr, T, M, H, row_programs,
    TILE: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """r[tokens] -= a delta: some columns and a share of an expert's tiles of rows; delta and offsets are its own."""
    h = tl.program_id(0) * TILE + tl.arange(0, TILE)
    stop = tl.load(offsets_ptr + 1)
    for start in range(tl.load(offsets_ptr) + tl.program_id(1) * TILE, stop, row_programs * TILE):
        n = start + tl.arange(0, TILE)
        t = tl.load(tokens_ptr + n, mask=n < stop, other=-1)
        there = (t >= 0) & (t < T)
        at = r_ptr + t[:, None] * H + h[None, :]
        mask = there[:, None] & (h < H)[None, :]
        r = tl.load(at, mask=mask, other=0.0)
        for chunk in range(0, M, CHUNK):
            sum = tl.full((TILE, TILE), 0, tl.float32)
            for channel in range(chunk, min(chunk + CHUNK, M), DEPTH):
                k = channel + tl.arange(0, DEPTH)
                a = tl.load(a_ptr + n[:, None] * M + k[None, :], mask=there[:, None] & (k < M)[None, :], other=0.0)
                d = tl.load(
                    delta_ptr + k[:, None] * H + h[None, :], mask=(k < M)[:, None] & (h < H)[None, :], other=0.0
                )
                sum = tl.dot(a, d, sum, input_precision="ieee")
            r -= sum
        tl.store(at, r, mask=mask)


def scatter_residual(r: Tensor, a: Tensor, delta: Tensor, tokens: Tensor, offsets: Tensor) -> None:
    (T, H), (N, M) = r.shape, a.shape
    offsets, row_programs = offsets.clamp(0, N), min(triton.cdiv(N, TILE), ROW_PROGRAMS)
    if H * N * M == 0:
        return
    for e in range(len(offsets) - 1):
        subtract_kernel[(triton.cdiv(H, TILE), row_programs)](
            r, a, delta[e], tokens, offsets[e:], T, M, H, row_programs, TILE=TILE, CHUNK=CHUNK, DEPTH=DEPTH,
            enable_fp_fusion=False,
        )  # fmt: skip
