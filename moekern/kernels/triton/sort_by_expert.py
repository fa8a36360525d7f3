"""Stable counting sort: blocks of slots count, one scan over the table of counts gives places, blocks move."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # slots a program counts and moves
PART = 128  # slots that it compares with as many others at a time


@triton.jit
def experts_of(idx_ptr, mask_ptr, slot, slots, E, K: tl.constexpr):
    """The experts of these slots: E for an empty one, E + 1 past the end."""
    inside = slot < slots
    e = tl.load(idx_ptr + slot, mask=inside, other=-1)
    filled = (e >= 0) & (e < E)
    if mask_ptr is not None:
        filled &= tl.load(mask_ptr + slot // K, mask=inside, other=0) != 0
    return tl.where(inside, tl.where(filled, e, E), E + 1).to(tl.int32)


@triton.jit(do_not_specialize=["slots", "blocks"])
def count_kernel(
    idx_ptr, mask_ptr, counts_ptr, slots, E, blocks, K: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.histogram(experts_of(idx_ptr, mask_ptr, slot, slots, E, K), BINS)
    bins = tl.arange(0, BINS)
    tl.store(counts_ptr + bins.to(tl.int64) * blocks + tl.program_id(0), count, mask=bins <= E)


@triton.jit(do_not_specialize=["slots", "blocks"])
def move_kernel(
    idx_ptr, mask_ptr, first_ptr, order_ptr, slots, E, blocks, K: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr
):
    """A slot's place is its expert's first in this block, plus how many slots before it have the same expert."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, PART)
    for mine in range(0, BLOCK, PART):
        slot = start + mine + lane
        e = experts_of(idx_ptr, mask_ptr, slot, slots, E, K)
        rank = tl.full((PART,), 0, tl.int32)
        for other in range(0, mine + PART, PART):
            before = (other + lane)[None, :] < (mine + lane)[:, None]
            same = experts_of(idx_ptr, mask_ptr, start + other + lane, slots, E, K)[None, :] == e[:, None]
            rank += tl.sum((same & before).to(tl.int32), 1)
        there = slot < slots
        first = tl.load(first_ptr + e.to(tl.int64) * blocks + tl.program_id(0), mask=there, other=0)
        tl.store(order_ptr + first + rank, slot, mask=there)


def sort_by_expert(topk_idx: Tensor, num_experts: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    slots, K, E = topk_idx.numel(), topk_idx.shape[1], num_experts
    blocks = triton.cdiv(slots, BLOCK)
    order = topk_idx.new_empty(slots, dtype=torch.int64)
    if slots == 0:
        return order, topk_idx.new_zeros(E + 1, dtype=torch.int64)
    bins = triton.next_power_of_2(E + 2)
    counts = topk_idx.new_empty(E + 1, blocks, dtype=torch.int32)
    count_kernel[(blocks,)](
        topk_idx, mask, counts, slots, E, blocks, K=K, BLOCK=BLOCK, BINS=bins, enable_fp_fusion=False
    )
    first = counts.view(-1).cumsum(0).view_as(counts) - counts  # int64: by expert, then by block
    move_kernel[(blocks,)](
        topk_idx, mask, first, order, slots, E, blocks, K=K, BLOCK=BLOCK, PART=PART, enable_fp_fusion=False
    )
    return order, first[:, 0].contiguous()
