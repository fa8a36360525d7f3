"""router_stats: logits by chunks of tokens, pairs of slots by integer atomics, gates in expert order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from moekern.kernels.triton.chunks import CHUNK, TILE, Chunks, add_chunks, chunk_rows, chunks_of
from moekern.kernels.triton.floats import exponential, logarithm, logarithm_of_one_plus
from moekern.kernels.triton.sort_by_expert import sort_by_expert

if TYPE_CHECKING:
    from moekern.kernels.sums import RouterSums

TOKENS = 128  # whose scores a program sums in float32
GRAM_TOKENS = 256  # whose products of logits a program sums in float32
GRAM_BLOCK = 64  # logits whose products with as many others a program sums
GRAM_PROGRAMS = 1024  # about as many as keep a GPU busy: the tokens are divided until there are so many


@triton.jit
def scored(x, SCORE: tl.constexpr):
    """A logit's score before it is divided by the row's total, and the score's logarithm; exp below -87 is 0."""
    low = x < -87.0
    c = tl.where(low, -87.0, x)
    if SCORE == "softmax":  # x <= 0: the largest logit is subtracted before
        s = exponential(c)
        log = c
    elif SCORE == "sigmoid":
        s = tl.div_rn(1.0, exponential(-tl.where(c > 87.0, 87.0, c)) + 1.0)
        log = logarithm(s)
    elif SCORE == "sqrtsoftplus":
        size = tl.abs(x)
        softplus = tl.where(x > 0.0, x, 0.0) + logarithm_of_one_plus(exponential(-tl.where(size > 87.0, 87.0, size)))
        s = tl.sqrt_rn(softplus)
        log = logarithm(softplus) * 0.5
    else:
        low = x == -float("inf")
        s = x
        log = logarithm(tl.where(x > 0.0, x, 1.0))
    return tl.where(low, 0.0, s), log


@triton.jit
def kth_and_next(x, K):
    """The K-th and the (K + 1)-th largest of each row, by taking away one value, however often it occurs, at a time."""
    kth = tl.max(x, 1)
    largest, next, taken = kth, kth, tl.full(kth.shape, 0, tl.float32)
    for _ in range(K + 1):
        kth = tl.where(taken < K, largest, kth)
        next = tl.where(taken < K + 1, largest, next)
        taken += tl.sum((x == largest[:, None]).to(tl.float32), 1)
        largest = tl.max(tl.where(x < largest[:, None], x, -float("inf")), 1)
    return kth, next


@triton.jit(do_not_specialize=["T"])
def logits_kernel(
    logits_ptr, mask_ptr, partial_ptr, T, E, K: tl.constexpr,
    SCORE: tl.constexpr, MARGIN: tl.constexpr, TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    score_sum = tl.full((BLOCK_T, BLOCK_E), 0, tl.float32)
    entropy = tl.full((BLOCK_T,), 0, tl.float64)
    margin = tl.full((BLOCK_T,), 0, tl.float64)
    for start in range(0, TOKENS, BLOCK_T):
        t = chunk * TOKENS + start + tl.arange(0, BLOCK_T)
        live = t < T
        if mask_ptr is not None:
            live &= tl.load(mask_ptr + t, mask=live, other=0) != 0
        there = live[:, None] & (e < E)[None, :]
        x = tl.load(logits_ptr + t[:, None] * E + e[None, :], mask=there, other=-float("inf")).to(tl.float32)
        top = tl.full((BLOCK_T,), 0, tl.float32)
        if SCORE == "softmax":
            top = tl.where(live, tl.max(x, 1), 0.0)
        s, log = scored(x - top[:, None], SCORE)
        total = tl.where(live, tl.sum(s, 1), 1.0)
        scale = tl.full(total.shape, 1.0, tl.float32)
        if SCORE == "softmax":
            scale = tl.div_rn(scale, total)
        score_sum += s * scale[:, None]
        # With p = s / total: -sum of p ln p = ln total - (sum of s ln s) / total.
        mean = tl.sum(s * log, 1).to(tl.float64) / total.to(tl.float64)
        entropy += tl.where(live, logarithm(total).to(tl.float64) - mean, 0.0)
        if MARGIN:
            kth, next = kth_and_next(x, K)
            large, _ = scored(kth - top, SCORE)
            small, _ = scored(next - top, SCORE)
            margin += tl.where(live, (large * scale).to(tl.float64) - (small * scale).to(tl.float64), 0.0)
    at = partial_ptr + chunk * (E + 2)
    tl.store(at + e, tl.sum(score_sum, 0).to(tl.float64), mask=e < E)
    tl.store(at + E, tl.sum(entropy, 0))
    tl.store(at + E + 1, tl.sum(margin, 0))


@triton.jit(do_not_specialize=["T", "chunks"])
def gram_kernel(
    logits_ptr, mask_ptr, partial_ptr, T, E, chunks, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    """A block of products of logits: float32 over the tokens of a chunk, float64 over this program's chunks."""
    i = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    j = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.full((BLOCK_E, BLOCK_E), 0, tl.float64)
    first = tl.program_id(0).to(tl.int64) * chunks
    for chunk in range(first, first + chunks):
        sum = tl.full((BLOCK_E, BLOCK_E), 0, tl.float32)
        for start in range(0, CHUNK, BLOCK_T):
            t = chunk * CHUNK + start + tl.arange(0, BLOCK_T)
            live = t < T
            if mask_ptr is not None:
                live &= tl.load(mask_ptr + t, mask=live, other=0) != 0
            at = logits_ptr + t[:, None] * E
            a = tl.load(at + i[None, :], mask=live[:, None] & (i < E)[None, :], other=0.0).to(tl.float32)
            b = tl.load(at + j[None, :], mask=live[:, None] & (j < E)[None, :], other=0.0).to(tl.float32)
            sum = tl.dot(tl.trans(a), b, sum, input_precision="ieee")
        total += sum.to(tl.float64)
    at = partial_ptr + (tl.program_id(0).to(tl.int64) * E + i[:, None]) * E + j[None, :]
    tl.store(at, total, mask=(i < E)[:, None] & (j < E)[None, :])


@triton.jit(do_not_specialize=["T"])
def slots_kernel(
    idx_ptr, weight_ptr, mask_ptr, top1_ptr, coactivation_ptr, T, E,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    there = (t < T)[:, None] & (k < K)[None, :]
    slot = t[:, None] * K + k[None, :]
    id = tl.load(idx_ptr + slot, mask=there, other=-1).to(tl.int64)
    filled = (id >= 0) & (id < E)
    if mask_ptr is not None:
        filled &= (tl.load(mask_ptr + t, mask=t < T, other=0) != 0)[:, None]

    gate = tl.load(weight_ptr + slot, mask=filled, other=-float("inf")).to(tl.float32)
    best = tl.argmax(gate, 1, tie_break_left=True)
    first = tl.sum(tl.where(k[None, :] == best[:, None], id, 0), 1)
    routed = tl.sum(filled.to(tl.int32), 1) > 0
    tl.atomic_add(top1_ptr + first, 1, mask=routed, sem="relaxed")

    pair = filled[:, :, None] & filled[:, None, :]
    same_slot = (k[:, None] == k[None, :])[None, :, :]
    pair &= same_slot | (id[:, :, None] != id[:, None, :])
    at = coactivation_ptr + id[:, :, None] * E + id[:, None, :]
    tl.atomic_add(at, 1, mask=pair, sem="relaxed")


@triton.jit
def gates_kernel(
    weight_ptr, order_ptr, offsets_ptr, first_ptr, partial_ptr, E, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr
):
    e, start, stop = chunk_rows(offsets_ptr, first_ptr, E, CHUNK, BLOCK_E)
    if e < E:
        n = start + tl.arange(0, CHUNK)
        slot = tl.load(order_ptr + n, mask=n < stop, other=0)
        gate = tl.load(weight_ptr + slot, mask=n < stop, other=0.0).to(tl.float64)
        at = partial_ptr + tl.program_id(0).to(tl.int64) * 2
        tl.store(at, tl.sum(gate, 0))
        tl.store(at + 1, tl.sum(gate * gate, 0))


def router_stats(
    logits: Tensor | None, topk_idx: Tensor, topk_weight: Tensor, mask: Tensor | None, sums: RouterSums, *, score: str
) -> None:
    (T, K), E = topk_idx.shape, len(sums.count)
    if T == 0:
        return
    counted = T if mask is None else mask.sum()
    sums.tokens.add_(counted)
    if K:
        add_slots(topk_idx, topk_weight, mask, sums)
    if logits is None:
        return
    sums.logit_tokens.add_(counted)
    block = triton.next_power_of_2(E)
    rows = max(1, min(TOKENS, TILE // block))
    chunks = triton.cdiv(T, TOKENS)
    partial = sums.gate_sum.new_empty(chunks, E + 2)
    logits_kernel[(chunks,)](
        logits, mask, partial, T, E, K=K, SCORE=score, MARGIN=0 < K < E, TOKENS=TOKENS, BLOCK_T=rows, BLOCK_E=block,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    all_chunks = sums.tokens.new_zeros(2)
    all_chunks[1:].fill_(chunks)
    total = add_chunks(partial, all_chunks, partial.new_zeros(1, E + 2))[0]
    sums.score_sum.add_(total[:E])
    sums.entropy_sum.add_(total[E])
    sums.margin_sum.add_(total[E + 1])
    if sums.logit_gram.numel():
        add_gram(logits, mask, sums.logit_gram)


def add_gram(logits: Tensor, mask: Tensor | None, logit_gram: Tensor) -> None:
    T, E = logits.shape
    blocks, chunks = triton.cdiv(E, GRAM_BLOCK), triton.cdiv(T, GRAM_TOKENS)
    each = triton.cdiv(chunks, max(1, GRAM_PROGRAMS // blocks**2))  # chunks a program adds up
    partial = logit_gram.new_empty(triton.cdiv(chunks, each), E, E)
    gram_kernel[(len(partial), blocks, blocks)](
        logits, mask, partial, T, E, each, CHUNK=GRAM_TOKENS, BLOCK_T=32, BLOCK_E=GRAM_BLOCK, enable_fp_fusion=False
    )
    logit_gram.add_(partial.sum(0))


def add_slots(topk_idx: Tensor, topk_weight: Tensor, mask: Tensor | None, sums: RouterSums) -> None:
    (T, K), E = topk_idx.shape, len(sums.count)
    block = triton.next_power_of_2(K)
    rows = max(1, TILE // block**2)
    slots_kernel[(triton.cdiv(T, rows),)](
        topk_idx,
        topk_weight,
        mask,
        sums.top1_count,
        sums.coactivation,
        T,
        E,
        K=K,
        BLOCK_T=rows,
        BLOCK_K=block,
        enable_fp_fusion=False,
    )
    order, offsets = sort_by_expert(topk_idx, E, mask)
    sums.count.add_(offsets.diff())
    chunks: Chunks = chunks_of(offsets, T * K)
    partial = sums.gate_sum.new_empty(chunks.limit, 2)
    gates_kernel[(chunks.limit,)](
        topk_weight, order, chunks.offsets, chunks.first, partial, E, CHUNK=CHUNK, BLOCK_E=chunks.block,
        enable_fp_fusion=False,
    )  # fmt: skip
    total = add_chunks(partial, chunks.first, partial.new_zeros(E, 2))
    sums.gate_sum.add_(total[:, 0])
    sums.gate_square_sum.add_(total[:, 1])
