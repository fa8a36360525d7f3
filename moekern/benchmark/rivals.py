"""What a user would write in torch for each op; plain functions of tensors, so that torch.compile can take them."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.kernels import GramSums, SimilaritySums, WeightSums
from moekern.kernels.sums import ExpertSums, MixtureSums, RouterSums


def router_stats(logits: Tensor, topk_idx: Tensor, topk_weight: Tensor, sums: RouterSums, score: str) -> None:
    E, K = len(sums.count), topk_idx.shape[1]
    flat, gate = topk_idx.reshape(-1), topk_weight.reshape(-1).double()
    s = logits.float().softmax(1) if score == "softmax" else logits.float().sigmoid()
    p = s / s.sum(1, keepdim=True)
    largest = s.topk(K + 1, dim=1).values if K < E else None
    chosen = torch.zeros_like(s).scatter_(1, topk_idx, 1.0)
    sums.tokens.add_(len(s))
    sums.logit_tokens.add_(len(s))
    sums.count.add_(torch.bincount(flat, minlength=E))
    sums.top1_count.add_(torch.bincount(topk_idx.gather(1, topk_weight.argmax(1, True))[:, 0], minlength=E))
    sums.gate_sum.index_add_(0, flat, gate)
    sums.gate_square_sum.index_add_(0, flat, gate.square())
    sums.score_sum.add_(s.sum(0))
    sums.entropy_sum.sub_((p * p.clamp(min=1e-30).log()).sum())
    if largest is not None:
        sums.margin_sum.add_((largest[:, K - 1] - largest[:, K]).sum())
    sums.coactivation.add_((chosen.T @ chosen).long())
    if sums.logit_gram.numel():
        sums.logit_gram.add_(logits.float().T @ logits.float())


def combine(y: Tensor, topk_weight: Tensor, order: Tensor) -> Tensor:
    """The output alone, without any statistics."""
    T, K = topk_weight.shape
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return (y[place].view(T, K, -1).float() * topk_weight[..., None]).sum(1).to(y.dtype)


def combine_and_measure(
    y: Tensor, topk_weight: Tensor, topk_idx: Tensor, order: Tensor, residual: Tensor | None, sums: ExpertSums
) -> Tensor:
    T, K = topk_idx.shape
    E = len(sums.norm_sum)
    gate, expert, token = topk_weight.reshape(-1)[order], topk_idx.reshape(-1)[order], order // K
    out = torch.zeros(T, y.shape[1], device=y.device).index_add_(0, token, gate[:, None].float() * y.float())
    norm = torch.linalg.vector_norm(y, dim=1, dtype=torch.float32).double()
    a = gate * norm
    sums.norm_sum.index_add_(0, expert, norm)
    sums.norm_square_sum.index_add_(0, expert, norm.square())
    sums.gated_norm_sum.index_add_(0, expert, a)
    sums.gated_norm_square_sum.index_add_(0, expert, a.square())
    sums.max_abs.copy_(sums.max_abs.scatter_reduce(0, expert, y.abs().amax(1).double(), "amax"))
    spread = torch.zeros(T, E, dtype=torch.float64, device=y.device).index_put_((token, expert), a)
    sums.pair_sum.add_(spread.T @ spread)
    if sums.square_sum.shape[1]:
        sums.square_sum.index_add_(0, expert, y.double().square())
        sums.value_sum.index_add_(0, expert, y.double())
        sums.unit_sum.index_add_(0, expert, y.double() / norm[:, None])
    if residual is not None:
        h = residual.float()
        turn = 1 - torch.cosine_similarity(h, h + out.to(y.dtype).float(), dim=1).double()
        sums.residual_sum.index_add_(0, expert, a * turn[token])
        sums.residual_tokens.add_(T)
    return out.to(y.dtype)


def mixture_stats(
    y: Tensor, topk_weight: Tensor, topk_idx: Tensor, order: Tensor, sums: MixtureSums, gram: Tensor
) -> None:
    (T, K), E = topk_idx.shape, len(gram)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    p = y[place].view(T, K, -1).float() * topk_weight.float()[..., None]
    total = topk_weight.double().sum(1, keepdim=True)
    w = topk_weight.double() / total
    apart = torch.linalg.vector_norm(p - w.float()[..., None] * p.sum(1, keepdim=True), dim=2).double()
    left, expert = apart / (1 - w).clamp(min=1e-6), topk_idx.reshape(-1)
    sums.mixture_norm_sum.index_add_(0, expert, apart.view(-1))
    sums.mixture_square_sum.index_add_(0, expert, apart.view(-1).square())
    sums.left_out_norm_sum.index_add_(0, expert, left.view(-1))
    sums.left_out_square_sum.index_add_(0, expert, left.view(-1).square())
    sums.share_sum.add_(total.sum())
    sums.share_square_sum.add_(total.square().sum())
    pairs = (topk_idx[:, :, None] * E + topk_idx[:, None, :]).view(-1)
    gram.view(-1).index_add_(0, pairs, (p @ p.mT).double().view(-1))


def sort_by_expert(topk_idx: Tensor, E: int) -> tuple[Tensor, Tensor]:
    flat = topk_idx.reshape(-1)
    return flat.argsort(stable=True), torch.nn.functional.pad(torch.bincount(flat, minlength=E).cumsum(0), (1, 0))


def similarity(y: Tensor, sums: SimilaritySums) -> None:
    rows = y.float()
    unit = torch.nn.functional.normalize(rows, dim=2)
    sums.tokens.add_(y.shape[1])
    sums.gram_sum.add_(torch.einsum("ith,jth->ij", rows, rows))
    sums.cosine_sum.add_(torch.einsum("ith,jth->ij", unit, unit))


def vocabulary(token_ids: Tensor, topk_idx: Tensor, seen: Tensor) -> None:
    """`seen` [E, V] bool."""
    seen[topk_idx.reshape(-1), token_ids.repeat_interleave(topk_idx.shape[1])] = True


def weight_stats(weight: Tensor, sums: WeightSums) -> None:
    for e in range(len(sums.count)):
        w = weight[e].float()
        sums.count[e] += w.numel()
        sums.abs_sum[e] += w.abs().sum()
        sums.square_sum[e] += w.square().sum()
        sums.max_abs[e] = sums.max_abs[e].maximum(w.abs().max())


def fp8_blocks(codes: Tensor, scale: Tensor, block: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """float8 [E, R, C] with a scale for every block x block, as numbers."""
    R, C = codes.shape[1:]
    wide = scale.repeat_interleave(block, 1)[:, :R].repeat_interleave(block, 2)[:, :, :C]
    return (codes.float() * wide).to(dtype)


def expert_gram(a: Tensor, r: Tensor, tokens: Tensor, rows: int, sums: GramSums) -> None:
    """`rows` rows of each expert, one after the other."""
    for e, (own, token) in enumerate(zip(a.split(rows), tokens.split(rows), strict=True)):
        sums.gram[e] += own.T @ own
        sums.product[e] += own.T @ r[token]


def gated_energy(inner: Tensor, gates: Tensor, rows: int, energy: Tensor) -> Tensor:
    a = inner.float() * gates[:, None]
    energy.add_(a.square().view(len(energy), rows, -1).sum(1))
    return a


def scatter_residual(r: Tensor, a: Tensor, delta: Tensor, tokens: Tensor, rows: int) -> None:
    for own, change, token in zip(a.split(rows), delta, tokens.split(rows), strict=True):
        r.index_add_(0, token, own @ change, alpha=-1)
