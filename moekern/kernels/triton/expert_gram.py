"""expert_gram: a program has a tile of one expert's products and adds chunks of rows in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from moekern.kernels.triton.chunks import CHUNK

if TYPE_CHECKING:
    from moekern.kernels.expert_gram import GramSums

TILE = 64  # channels, times as many columns
ROWS = 32  # that are multiplied at a time


@triton.jit(do_not_specialize=["T"])
def products_kernel(
    a_ptr, b_ptr, tokens_ptr, offsets_ptr, mask_ptr, total_ptr, T, M, C,
    SYMMETRIC: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """total[e] += a'b of expert e's rows, a tile of it: float32 over a chunk's rows, float64 across."""
    e = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if not SYMMETRIC or tl.program_id(0) <= tl.program_id(1):
        total = tl.full((TILE, TILE), 0, tl.float64)
        stop = tl.load(offsets_ptr + e + 1)
        for chunk in range(tl.load(offsets_ptr + e), stop, CHUNK):
            sum = tl.full((TILE, TILE), 0, tl.float32)
            for start in range(chunk, tl.minimum(chunk + CHUNK, stop), ROWS):
                n = start + tl.arange(0, ROWS)
                counted = n < stop
                if mask_ptr is not None:
                    counted &= tl.load(mask_ptr + n, mask=counted, other=0) != 0
                t = n
                if tokens_ptr is not None:
                    t = tl.load(tokens_ptr + n, mask=counted, other=0)
                there = counted & (t >= 0) & (t < T)
                a = tl.load(a_ptr + n[:, None] * M + i[None, :], mask=counted[:, None] & (i < M)[None, :], other=0.0)
                b = tl.load(b_ptr + t[:, None] * C + j[None, :], mask=there[:, None] & (j < C)[None, :], other=0.0)
                sum = tl.dot(tl.trans(a), b, sum, input_precision="ieee")
            total += sum.to(tl.float64)
        inside = (i < M)[:, None] & (j < C)[None, :]
        if SYMMETRIC:
            inside &= i[:, None] <= j[None, :]
        at = total_ptr + (e * M + i[:, None]) * C + j[None, :]
        total += tl.load(at, mask=inside, other=0.0)
        tl.store(at, total, mask=inside)
        if SYMMETRIC:
            tl.store(total_ptr + (e * M + j[None, :]) * M + i[:, None], total, mask=inside & (i[:, None] < j[None, :]))


def expert_gram(
    a: Tensor, r: Tensor, offsets: Tensor, mask: Tensor | None, sums: GramSums, *, tokens: Tensor | None
) -> None:
    (N, M), (T, H), E = a.shape, r.shape, len(offsets) - 1
    offsets = offsets.clamp(0, N)
    tiles = triton.cdiv(M, TILE)
    if E * N * M == 0:
        return
    if sums.gram.numel():
        products_kernel[(tiles, tiles, E)](
            a, a, None, offsets, mask, sums.gram, N, M, M, SYMMETRIC=True, TILE=TILE, CHUNK=CHUNK, ROWS=ROWS,
            enable_fp_fusion=False,
        )  # fmt: skip
    if H:
        products_kernel[(tiles, triton.cdiv(H, TILE), E)](
            a, r, tokens, offsets, mask, sums.product, T, M, H, SYMMETRIC=False, TILE=TILE, CHUNK=CHUNK, ROWS=ROWS,
            enable_fp_fusion=False,
        )  # fmt: skip
