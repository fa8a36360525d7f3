"""mixture_stats: a token's rows against their mixture and each other, then summed by chunks of rows of one expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekern.kernels.reference_mixture import LEAST_REST
from moekern.kernels.triton.chunks import CHUNK, TILE, Chunks, add_chunks, chunk_rows, chunks_of
from moekern.kernels.triton.combine_and_measure import row_of_kernel, slots_of

if TYPE_CHECKING:
    from moekern.kernels.sums import MixtureSums

SCALARS = (
    "mixture_norm_sum",
    "mixture_square_sum",
    "left_out_norm_sum",
    "left_out_square_sum",
)  # of distances_kernel


@triton.jit(do_not_specialize=["T"])
def mixture_kernel(
    y_ptr, weight_ptr, w_ptr, row_of_ptr, square_ptr, dots_ptr, T, H,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A block of columns of some tokens: its part of the squared distance of each slot's row, and of their products."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    h = part * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_K)
    slot = t[:, None] * K + k[None, :]
    there = (t < T)[:, None] & (k < K)[None, :]
    row = tl.load(row_of_ptr + slot, mask=there, other=-1)
    filled = (row >= 0)[:, :, None] & (h < H)[None, None, :]
    gate = tl.load(weight_ptr + slot, mask=row >= 0, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row[:, :, None] * H + h[None, None, :], mask=filled, other=0.0).to(tl.float32)
    p = gate[:, :, None] * y
    if square_ptr is not None:
        w = tl.load(w_ptr + slot, mask=there, other=0.0)
        apart = p - w[:, :, None] * tl.sum(p, 1)[:, None, :]
        tl.store(square_ptr + slot * parts + part, tl.sum(apart * apart, 2), mask=there)
    if dots_ptr is not None:
        for i in range(K):
            one = tl.sum(tl.where((k == i)[None, :, None], p, 0.0), 1)
            at = dots_ptr + ((t * K + i)[:, None] * K + k[None, :]) * parts + part
            tl.store(at, tl.sum(p * one[:, None, :], 2), mask=there)


@triton.jit(do_not_specialize=["slots"])
def distances_kernel(
    square_ptr, rest_ptr, order_ptr, mask_ptr, offsets_ptr, first_ptr, partial_ptr, slots, E,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One chunk's sums of d, d^2, l and l^2."""
    e, start, stop = chunk_rows(offsets_ptr, first_ptr, E, CHUNK, BLOCK_E)
    if e < E:
        slot, _, counted = slots_of(order_ptr, mask_ptr, start + tl.arange(0, CHUNK), stop, slots, K)
        apart = tl.sqrt(tl.load(square_ptr + slot, mask=counted, other=0.0).to(tl.float64))
        left = apart / tl.load(rest_ptr + slot, mask=counted, other=1.0)
        at = partial_ptr + tl.program_id(0).to(tl.int64) * 4
        tl.store(at, tl.sum(apart, 0))
        tl.store(at + 1, tl.sum(apart * apart, 0))
        tl.store(at + 2, tl.sum(left, 0))
        tl.store(at + 3, tl.sum(left * left, 0))


@triton.jit(do_not_specialize=["slots"])
def contributions_kernel(
    dots_ptr, idx_ptr, order_ptr, mask_ptr, offsets_ptr, first_ptr, partial_ptr, slots, E,
    K: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One chunk's sums of <p_i, p_j> for i its expert and every j > i; of a row with itself for j = i."""
    i, start, stop = chunk_rows(offsets_ptr, first_ptr, E, CHUNK, BLOCK_E)
    if i < E:
        j = tl.arange(0, BLOCK_E)
        sum = tl.full((ROWS, BLOCK_E), 0, tl.float64)
        for row in range(start, stop, ROWS):
            slot, _, counted = slots_of(order_ptr, mask_ptr, row + tl.arange(0, ROWS), stop, slots, K)
            for k in range(K):
                other = slot // K * K + k
                id = tl.load(idx_ptr + other, mask=counted, other=-1)
                meant = counted & ((id != i) | (other == slot))
                product = tl.load(dots_ptr + slot * K + k, mask=meant, other=0.0).to(tl.float64)
                sum += tl.where(id[:, None] == j[None, :], product[:, None], 0.0)
        at = partial_ptr + tl.program_id(0).to(tl.int64) * E + j
        tl.store(at, tl.where(j >= i, tl.sum(sum, 0), 0.0), mask=j < E)


def mixture_stats(
    y: Tensor, topk_weight: Tensor, share: Tensor, topk_idx: Tensor, order: Tensor, offsets: Tensor,
    mask: Tensor | None, sums: MixtureSums | None, gram: Tensor | None,
) -> None:  # fmt: skip
    """kernels.mixture_stats with checked arguments; sums and gram, where they are there, added to in place."""
    (N, H), (T, K) = y.shape, topk_idx.shape
    if N == 0 or T * K == 0:
        return
    row_of = order.new_full((T * K,), -1)
    row_of_kernel[(triton.cdiv(N, 1024),)](order, offsets[-1:], row_of, N, T * K, BLOCK=1024, enable_fp_fusion=False)
    if mask is not None:
        row_of = row_of.masked_fill(~mask.repeat_interleave(K), -1)
    given = share.double().masked_fill(row_of.view(T, K) < 0, 0)
    total = given.sum(1, keepdim=True)
    w = (given / total).masked_fill(total == 0, 0)
    block = triton.next_power_of_2(K)
    columns = max(1, min(triton.next_power_of_2(max(1, H)), TILE // block))
    tokens = max(1, TILE // (block * columns))
    parts = triton.cdiv(H, columns)
    square = None if sums is None else y.new_zeros(T * K, parts, dtype=torch.float32)
    dots = None if gram is None else y.new_zeros(T * K, K, parts, dtype=torch.float32)
    if parts:
        mixture_kernel[(triton.cdiv(T, tokens), parts)](
            y, topk_weight, w.float(), row_of, square, dots, T, H, K=K, BLOCK_T=tokens, BLOCK_K=block, BLOCK_H=columns,
            enable_fp_fusion=False,
        )  # fmt: skip
    chunks = chunks_of(offsets, N)
    if sums is not None and square is not None:
        add_distances(square.sum(1), (1 - w).clamp(min=LEAST_REST), order, mask, chunks, K, sums)
        sums.share_sum.add_(total.sum())
        sums.share_square_sum.add_(total.square().sum())
    if gram is not None and dots is not None:
        add_products(dots.sum(2), topk_idx, order, mask, chunks, gram)


def add_distances(
    square: Tensor, rest: Tensor, order: Tensor, mask: Tensor | None, chunks: Chunks, K: int, sums: MixtureSums
) -> None:
    partial = rest.new_empty(chunks.limit, len(SCALARS))
    distances_kernel[(chunks.limit,)](
        square, rest, order, mask, chunks.offsets, chunks.first, partial, rest.numel(), chunks.num_experts, K=K,
        CHUNK=CHUNK, BLOCK_E=chunks.block, enable_fp_fusion=False,
    )  # fmt: skip
    total = add_chunks(partial, chunks.first, rest.new_zeros(chunks.num_experts, len(SCALARS)))
    for name, column in zip(SCALARS, total.unbind(1), strict=True):
        getattr(sums, name).add_(column)


def add_products(
    dots: Tensor, topk_idx: Tensor, order: Tensor, mask: Tensor | None, chunks: Chunks, gram: Tensor
) -> None:
    E, K = chunks.num_experts, topk_idx.shape[1]
    partial = gram.new_empty(chunks.limit, E)
    contributions_kernel[(chunks.limit,)](
        dots, topk_idx, order, mask, chunks.offsets, chunks.first, partial, topk_idx.numel(), E, K=K, CHUNK=CHUNK,
        ROWS=max(1, min(CHUNK, TILE // chunks.block)), BLOCK_E=chunks.block, enable_fp_fusion=False,
    )  # fmt: skip
    found = add_chunks(partial, chunks.first, gram.new_zeros(E, E))
    gram.add_(found).add_(found.triu(1).T)
