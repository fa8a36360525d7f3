"""What every kernel computes. Other backends must agree with these functions; nothing else defines them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softplus

if TYPE_CHECKING:
    from moekern.kernels import ExpertSums, RouterSums, SimilaritySums

SCORES = {
    "softmax": lambda logits: logits.softmax(1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: softplus(logits, threshold=100).sqrt(),
    "identity": lambda logits: logits.where(logits > -torch.inf, 0),
}


def router_stats(
    logits: Tensor | None, topk_idx: Tensor, topk_weight: Tensor, mask: Tensor | None, sums: RouterSums, *, score: str
) -> None:
    E, K = len(sums.count), topk_idx.shape[1]
    if mask is not None:
        logits = None if logits is None else logits[mask]
        topk_idx, topk_weight = topk_idx[mask], topk_weight[mask]
    idx, gate = topk_idx.long(), topk_weight.double()
    filled = (idx >= 0) & (idx < E)
    sums.tokens.add_(len(idx))
    add_at(sums.count, idx[filled], None)
    add_at(sums.gate_sum, idx[filled], gate[filled])
    add_at(sums.gate_square_sum, idx[filled], gate[filled] ** 2)

    routed = filled.any(1)
    if K:
        slot = gate.masked_fill(~filled, -torch.inf).argmax(1, keepdim=True)
        add_at(sums.top1_count, idx.gather(1, slot)[routed, 0], None)
    i, j = idx[:, :, None].expand(-1, K, K), idx[:, None, :].expand(-1, K, K)
    pairs = filled[:, :, None] & filled[:, None, :] & (i != j)
    add_at(sums.coactivation.view(-1), (i * E + j)[pairs], None)
    add_at(sums.coactivation.view(-1), idx[filled] * (E + 1), None)

    if logits is None:
        return
    s = SCORES[score](logits.double())
    p = s / s.sum(1, keepdim=True)
    sums.logit_tokens.add_(len(s))
    sums.score_sum.add_(s.sum(0))
    sums.entropy_sum.add_(-torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0).sum())
    if 0 < K < E:
        largest = s.topk(K + 1, dim=1).values
        sums.margin_sum.add_((largest[:, K - 1] - largest[:, K]).sum())


def combine_and_measure(
    y: Tensor, topk_weight: Tensor, topk_idx: Tensor, order: Tensor, offsets: Tensor, mask: Tensor | None,
    sums: ExpertSums,
) -> Tensor:  # fmt: skip
    (T, K), E = topk_idx.shape, len(sums.norm_sum)
    row_of = torch.full((T * K,), -1, device=y.device).index_put_((order,), torch.arange(len(y), device=y.device))
    row_of = row_of.view(T, K)
    out = torch.zeros(T, y.shape[1], device=y.device)
    for k in range(K):  # a product, then a sum, each rounded to float32: the output's bits are part of the meaning
        filled = row_of[:, k] >= 0
        out[filled] += topk_weight[filled, k, None].float() * y[row_of[filled, k]].float()

    counted = (
        torch.ones_like(order, dtype=torch.bool) if mask is None else mask[order.div(max(K, 1), rounding_mode="floor")]
    )
    expert = topk_idx.reshape(-1)[order].long()
    norm = torch.cat([rows.double().norm(dim=1) for rows in y.split(4096)])
    gated = norm * topk_weight.reshape(-1)[order].double()
    e = expert[counted]
    add_at(sums.norm_sum, e, norm[counted])
    add_at(sums.norm_square_sum, e, norm[counted] ** 2)
    add_at(sums.gated_norm_sum, e, gated[counted])
    add_at(sums.gated_norm_square_sum, e, gated[counted] ** 2)
    top = y.abs().amax(1).double() if y.shape[1] else norm
    sums.max_abs.copy_(sums.max_abs.scatter_reduce(0, e, top[counted], "amax"))

    a = torch.zeros(T * K, dtype=torch.float64, device=y.device).index_put_((order[counted],), gated[counted])
    a, idx = a.view(T, K), topk_idx.long()
    i, j = idx[:, :, None].expand(-1, K, K), idx[:, None, :].expand(-1, K, K)
    pairs = (row_of[:, :, None] >= 0) & (row_of[:, None, :] >= 0) & (i != j)
    add_at(sums.pair_sum.view(-1), (i * E + j)[pairs], (a[:, :, None] * a[:, None, :])[pairs])
    add_at(sums.pair_sum.view(-1), e * (E + 1), gated[counted] ** 2)
    if sums.square_sum.shape[1]:
        for rows, experts in zip(y[counted].split(4096), e.split(4096), strict=True):
            add_at(sums.square_sum, experts, rows.double() ** 2)
    return out.to(y.dtype)


def similarity(y: Tensor, norm_square: Tensor | None, mask: Tensor | None, sums: SimilaritySums) -> None:
    if mask is not None:
        y, norm_square = y[:, mask], None if norm_square is None else norm_square[:, mask]
    E, T, _ = y.shape
    sums.tokens.add_(T)
    for start in range(0, T, 64):
        rows = y[:, start : start + 64].double().transpose(0, 1)  # [t, E, H]
        gram = rows @ rows.mT
        own = gram.diagonal(dim1=1, dim2=2)
        if norm_square is not None:
            own.copy_(norm_square[:, start : start + 64].T)
        scale = torch.where(own == 0, 0, own.rsqrt())
        cosine = gram * scale[:, :, None] * scale[:, None, :]
        cosine.diagonal(dim1=1, dim2=2).copy_(torch.where(own == 0, 0, own / own))
        sums.gram_sum.add_(gram.sum(0))
        sums.cosine_sum.add_(cosine.sum(0))


SKETCH_TOKENS = 64  # tokens that share a projection


def sketch(y: Tensor, size: int, *, seed: int, start: int) -> tuple[Tensor, Tensor]:
    E, T, H = y.shape
    z = torch.empty(E, T, size, device=y.device)
    t = 0
    while t < T:
        chunk = (start + t) // SKETCH_TOKENS
        stop = min(T, (chunk + 1) * SKETCH_TOKENS - start)
        z[:, t:stop] = (y[:, t:stop].double() @ signs(size, H, seed, chunk).to(y.device).T / size**0.5).float()
        t = stop
    return z, y.double().square().sum(2).float()


def signs(size: int, H: int, seed: int, chunk: int) -> Tensor:
    """A chunk's projection [size, H] before it is divided by the root of its size: +1 or -1, a bit of SplitMix64 each.

    Column h is bit h mod 64 of the word for (row, h // 64). int64 arithmetic wraps around like unsigned.
    """
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    key = mixed(torch.tensor(chunk + 1) * golden + seed)
    words = -(-H // 64)
    word = mixed(torch.arange(1, size * words + 1).view(size, words) * golden + key)
    bit = word[:, :, None] >> torch.arange(64) & 1
    return (2 * bit.reshape(size, words * 64)[:, :H] - 1).double()


def mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ (x >> shift & (1 << (64 - shift)) - 1)) * factor
    return x


def vocabulary(token_ids: Tensor, topk_idx: Tensor, mask: Tensor | None, bits: Tensor) -> None:
    (E, W), K = bits.shape, topk_idx.shape[1]
    idx, ids = topk_idx.reshape(-1).long(), token_ids.long().repeat_interleave(K)
    kept = (idx >= 0) & (idx < E)
    if mask is not None:
        kept &= mask.repeat_interleave(K)
    seen = unpacked(bits)
    seen[idx[kept], ids[kept]] = True
    shift = torch.arange(64, device=bits.device)
    bits.copy_((seen.view(E, W, 64).long() << shift).sum(2))


def popcount(bits: Tensor) -> Tensor:
    return unpacked(bits).sum(1)


def pair_popcount(bits: Tensor) -> Tensor:
    seen = unpacked(bits)
    return torch.stack([(seen & row).sum(1) for row in seen]) if len(seen) else bits.new_zeros(0, 0)


def unpacked(bits: Tensor) -> Tensor:
    """[E, W] words -> [E, 64·W] bool."""
    return (bits[:, :, None] >> torch.arange(64, device=bits.device) & 1).bool().view(len(bits), -1)


def add_at(total: Tensor, index: Tensor, values: Tensor | None) -> None:
    """total[index[n]] += values[n], or 1. Sorted by index first, so that sums have one order on every device."""
    counts = torch.bincount(index, minlength=len(total))
    if values is not None:
        counts = torch.segment_reduce(values[index.argsort(stable=True)], "sum", lengths=counts)
    total.add_(counts)
