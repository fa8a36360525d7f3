"""combine_and_measure: rows combined by token, then measured by chunks of rows that lie side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekern.kernels.triton.chunks import CHUNK, TILE, Chunks, add_chunks, chunk_rows, chunks_of
from moekern.kernels.triton.floats import rounded_to_bfloat16

if TYPE_CHECKING:
    from moekern.kernels.sums import ExpertSums

COLUMNS = 512  # of a row that a program combines, at most
# What measure_kernel leaves of a chunk, in its order.
SCALARS = ("norm_sum", "norm_square_sum", "gated_norm_sum", "gated_norm_square_sum", "residual_sum")
ELEMENTS = 1024  # of the output that a program combines: one warp of 32 each, so that no sum waits for other warps


@triton.jit(do_not_specialize=["N", "slots"])
def row_of_kernel(order_ptr, stop_ptr, row_of_ptr, N, slots, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = n < tl.minimum(tl.load(stop_ptr), N)
    slot = tl.load(order_ptr + n, mask=there, other=0)
    tl.store(row_of_ptr + slot, n, mask=there & (slot >= 0) & (slot < slots))


@triton.jit
def store_part(y, square_ptr, top_ptr, at, there):
    """Squares and largest magnitude of each row of y [rows, columns] float32."""
    tl.store(square_ptr + at, tl.sum(y * y, 1), mask=there)
    # Bits of non-negative floats are ordered like integers, with NaN above all.
    tl.store(top_ptr + at, tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), mask=there)


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    y_ptr, weight_ptr, row_of_ptr, residual_ptr, out_ptr, square_ptr, top_ptr, dots_ptr, T, H,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A block of columns of some tokens' outputs; where asked, its part of each row's squares and largest magnitude.

    With a residual h also its part of <h, h>, <h, out> and <out, out>, where out is as it was rounded.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    h = part * BLOCK_H + tl.arange(0, BLOCK_H)
    sum = tl.full((BLOCK_T, BLOCK_H), 0, tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of_ptr + t * K + k, mask=t < T, other=-1)
        filled = row >= 0
        gate = tl.load(weight_ptr + t * K + k, mask=filled, other=0.0).to(tl.float32)
        there = filled[:, None] & (h < H)[None, :]
        y = tl.load(y_ptr + row[:, None] * H + h[None, :], mask=there, other=0.0).to(tl.float32)
        sum += gate[:, None] * y
        if square_ptr is not None:
            store_part(y, square_ptr, top_ptr, row * parts + part, filled)
    there = (t < T)[:, None] & (h < H)[None, :]
    if out_ptr.dtype.element_ty == tl.bfloat16:
        sum = rounded_to_bfloat16(sum)
    at = t[:, None] * H + h[None, :]
    out = sum.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=there)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
        out = out.to(tl.float32)
        at = dots_ptr + (t * parts + part) * 3
        tl.store(at, tl.sum(residual * residual, 1), mask=t < T)
        tl.store(at + 1, tl.sum(residual * out, 1), mask=t < T)
        tl.store(at + 2, tl.sum(out * out, 1), mask=t < T)


@triton.jit
def slots_of(order_ptr, mask_ptr, n, stop, slots, K: tl.constexpr):
    """Slots of rows n < stop, which rows have one, and which of these count."""
    slot = tl.load(order_ptr + n, mask=n < stop, other=-1)
    there = (slot >= 0) & (slot < slots)
    counted = there
    if mask_ptr is not None:
        counted &= tl.load(mask_ptr + slot // K, mask=there, other=0) != 0
    return slot, there, counted


@triton.jit
def turn_of(dots_ptr, t, there, parts):
    """1 - cos(h, h + out) of tokens t, at least 0, from their dots: the determinant keeps what float32 would lose."""
    hh = tl.full(t.shape, 0, tl.float32)
    ho = tl.full(t.shape, 0, tl.float32)
    oo = tl.full(t.shape, 0, tl.float32)
    for part in range(parts):
        at = dots_ptr + (t * parts + part) * 3
        hh += tl.load(at, mask=there, other=0.0)
        ho += tl.load(at + 1, mask=there, other=0.0)
        oo += tl.load(at + 2, mask=there, other=0.0)
    hh, ho, oo = hh.to(tl.float64), ho.to(tl.float64), oo.to(tl.float64)
    along = hh + ho
    square = along + ho + oo
    determinant = hh * oo - ho * ho
    norms = tl.sqrt(hh) * tl.sqrt(tl.where(square < 0.0, 0.0, square))
    whole = tl.where(norms == 0.0, 1.0, norms)
    ahead = tl.where(determinant < 0.0, 0.0, determinant) / (whole * (whole + tl.where(along < 0.0, 0.0, along)))
    turn = tl.where(along < 0.0, 1.0 - along / whole, ahead)
    return tl.where(norms == 0.0, 1.0, turn)


@triton.jit(do_not_specialize=["slots"])
def measure_kernel(
    square_ptr, top_ptr, dots_ptr, weight_ptr, order_ptr, mask_ptr, offsets_ptr, first_ptr, gated_ptr, inverse_ptr,
    partial_ptr, max_ptr, slots, E, parts, dots_parts, K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One chunk's sums of norm, norm^2, a, a^2 and a x turn, and its largest magnitude; a of each of its slots, and one
    over the norm of each of its rows, 0 for rows of zeros."""
    e, start, stop = chunk_rows(offsets_ptr, first_ptr, E, CHUNK, BLOCK_E)
    if e < E:
        n = start + tl.arange(0, CHUNK)
        slot, there, counted = slots_of(order_ptr, mask_ptr, n, stop, slots, K)
        square = tl.full((CHUNK,), 0, tl.float32)
        top = tl.full((CHUNK,), 0, tl.int32)
        for part in range(parts):
            square += tl.load(square_ptr + n * parts + part, mask=there, other=0.0)
            top = tl.maximum(top, tl.load(top_ptr + n * parts + part, mask=there, other=0))
        norm = tl.sqrt(square.to(tl.float64))
        gated = tl.load(weight_ptr + slot, mask=there, other=0.0).to(tl.float64) * norm
        tl.store(gated_ptr + slot, gated, mask=there)
        zero = square == 0.0
        inverse = tl.where(zero, 0.0, 1.0 / tl.where(zero, 1.0, norm))
        tl.store(inverse_ptr + n, inverse.to(tl.float32), mask=there)
        norm = tl.where(counted, norm, 0.0)
        gated = tl.where(counted, gated, 0.0)
        at = partial_ptr + tl.program_id(0).to(tl.int64) * 5
        tl.store(at, tl.sum(norm, 0))
        tl.store(at + 1, tl.sum(tl.where(counted, square.to(tl.float64), 0.0), 0))
        tl.store(at + 2, tl.sum(gated, 0))
        tl.store(at + 3, tl.sum(gated * gated, 0))
        turned = gated
        if dots_ptr is not None:
            turned = gated * turn_of(dots_ptr, slot // K, counted, dots_parts)
        tl.store(at + 4, tl.sum(tl.where(counted, turned, 0.0), 0))
        tl.atomic_max(max_ptr + e, tl.max(tl.where(counted, top, 0), 0), sem="relaxed")


@triton.jit(do_not_specialize=["slots"])
def pairs_kernel(
    gated_ptr, idx_ptr, order_ptr, mask_ptr, offsets_ptr, first_ptr, partial_ptr, slots, E,
    K: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One chunk's sums of a_i a_j for i its expert and every j > i."""
    i, start, stop = chunk_rows(offsets_ptr, first_ptr, E, CHUNK, BLOCK_E)
    if i < E:
        j = tl.arange(0, BLOCK_E)
        sum = tl.full((ROWS, BLOCK_E), 0, tl.float64)
        for row in range(start, stop, ROWS):
            slot, _, counted = slots_of(order_ptr, mask_ptr, row + tl.arange(0, ROWS), stop, slots, K)
            a = tl.load(gated_ptr + slot, mask=counted, other=0.0)
            for k in range(K):
                other = slot // K * K + k
                id = tl.load(idx_ptr + other, mask=counted, other=-1)
                product = a * tl.load(gated_ptr + other, mask=counted, other=0.0)
                sum += tl.where(id[:, None] == j[None, :], product[:, None], 0.0)
        at = partial_ptr + tl.program_id(0).to(tl.int64) * E + j
        tl.store(at, tl.where(j > i, tl.sum(sum, 0), 0.0), mask=j < E)


@triton.jit(do_not_specialize=["slots"])
def dimensions_kernel(
    y_ptr, inverse_ptr, order_ptr, mask_ptr, offsets_ptr, first_ptr, square_ptr, value_ptr, unit_ptr, slots, H, E,
    K: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One chunk's y^2, y and y / norm for a block of columns."""
    e, start, stop = chunk_rows(offsets_ptr, first_ptr, E, CHUNK, BLOCK_E)
    if e < E:
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        square = tl.full((ROWS, BLOCK_H), 0, tl.float32)
        value = tl.full((ROWS, BLOCK_H), 0, tl.float32)
        unit = tl.full((ROWS, BLOCK_H), 0, tl.float32)
        for row in range(start, stop, ROWS):
            n = row + tl.arange(0, ROWS)
            _, _, counted = slots_of(order_ptr, mask_ptr, n, stop, slots, K)
            there = counted[:, None] & (h < H)[None, :]
            y = tl.load(y_ptr + n[:, None] * H + h[None, :], mask=there, other=0.0).to(tl.float32)
            square += y * y
            value += y
            unit += y * tl.load(inverse_ptr + n, mask=counted, other=0.0)[:, None]
        at = tl.program_id(0).to(tl.int64) * H + h
        tl.store(square_ptr + at, tl.sum(square, 0), mask=h < H)
        tl.store(value_ptr + at, tl.sum(value, 0), mask=h < H)
        tl.store(unit_ptr + at, tl.sum(unit, 0), mask=h < H)


def combine_and_measure(
    y: Tensor, topk_weight: Tensor, topk_idx: Tensor, order: Tensor, offsets: Tensor, mask: Tensor | None,
    residual: Tensor | None, sums: ExpertSums | None, *, parts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """`parts` of every row's squares (float32) and largest magnitude (its bits), [N, any], if they are known."""
    (N, H), (T, K) = y.shape, topk_idx.shape
    if sums is not None and residual is not None:
        sums.residual_tokens.add_(T if mask is None else mask.sum())
    if N == 0 or T * K == 0:
        return y.new_zeros(T, H)
    out = y.new_empty(T, H)
    row_of = order.new_full((T * K,), -1)
    row_of_kernel[(triton.cdiv(N, 1024),)](order, offsets[-1:], row_of, N, T * K, BLOCK=1024, enable_fp_fusion=False)
    columns = min(COLUMNS, triton.next_power_of_2(max(1, H)))
    grid = triton.cdiv(T, ELEMENTS // columns), triton.cdiv(H, columns)
    shape = N, grid[1]
    measured = parts or (y.new_empty(shape, dtype=torch.float32), y.new_empty(shape, dtype=torch.int32))
    measuring = (None, None) if sums is None or parts else measured
    dots = None if residual is None else y.new_empty(T, grid[1], 3, dtype=torch.float32)
    combine_kernel[grid](
        y, topk_weight, row_of, residual, out, *measuring, dots, T, H, K=K, BLOCK_T=ELEMENTS // columns,
        BLOCK_H=columns, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    if sums is None:
        return out
    chunks = chunks_of(offsets, N)
    inverse = add_norms(*measured, dots, topk_weight, topk_idx, order, mask, chunks, sums)
    if sums.square_sum.shape[1]:
        add_dimensions(y, inverse, order, mask, chunks, T * K, K, sums)
    return out


def add_norms(
    square: Tensor, top: Tensor, dots: Tensor | None, topk_weight: Tensor, topk_idx: Tensor, order: Tensor,
    mask: Tensor | None, chunks: Chunks, sums: ExpertSums,
) -> Tensor:  # fmt: skip
    """Returns one over the norm of each row, [N] float32."""
    (T, K), E = topk_idx.shape, chunks.num_experts
    gated = sums.norm_sum.new_zeros(T * K)
    inverse = square.new_empty(len(square))
    partial = gated.new_empty(chunks.limit, 5)
    largest = top.new_zeros(E)
    measure_kernel[(chunks.limit,)](
        square, top, dots, topk_weight, order, mask, chunks.offsets, chunks.first, gated, inverse, partial, largest,
        T * K, E, square.shape[1], 0 if dots is None else dots.shape[1], K=K, CHUNK=CHUNK, BLOCK_E=chunks.block,
        enable_fp_fusion=False,
    )  # fmt: skip
    total = dict(zip(SCALARS, add_chunks(partial, chunks.first, gated.new_zeros(E, 5)).unbind(1), strict=True))
    for name, column in total.items():
        if name != "residual_sum" or dots is not None:
            getattr(sums, name).add_(column)
    torch.maximum(sums.max_abs, largest.view(torch.float32).double(), out=sums.max_abs)

    partial = gated.new_empty(chunks.limit, E)
    pairs_kernel[(chunks.limit,)](
        gated, topk_idx, order, mask, chunks.offsets, chunks.first, partial, T * K, E, K=K, CHUNK=CHUNK,
        ROWS=max(1, min(CHUNK, TILE // chunks.block)), BLOCK_E=chunks.block, enable_fp_fusion=False,
    )  # fmt: skip
    pairs = add_chunks(partial, chunks.first, gated.new_zeros(E, E))
    sums.pair_sum.add_(pairs).add_(pairs.T)
    sums.pair_sum.diagonal().add_(total["gated_norm_square_sum"])
    return inverse


def add_dimensions(
    y: Tensor, inverse: Tensor, order: Tensor, mask: Tensor | None, chunks: Chunks, slots: int, K: int, sums: ExpertSums
) -> None:
    E, H = sums.square_sum.shape
    columns = min(COLUMNS, triton.next_power_of_2(H))
    partial = inverse.new_empty(3, chunks.limit, H)
    dimensions_kernel[(chunks.limit, triton.cdiv(H, columns))](
        y, inverse, order, mask, chunks.offsets, chunks.first, *partial, slots, H, E, K=K, CHUNK=CHUNK,
        ROWS=min(CHUNK, TILE // 2 // columns), BLOCK_H=columns, BLOCK_E=chunks.block, enable_fp_fusion=False,
    )  # fmt: skip
    for part, total in zip(partial, (sums.square_sum, sums.value_sum, sums.unit_sum), strict=True):
        add_chunks(part, chunks.first, total)
