"""What every kernel computes. Other backends must agree with these functions; nothing else defines them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softplus

if TYPE_CHECKING:
    from moekern.kernels import ExpertSums, RouterSums

SCORES = {
    "softmax": lambda logits: logits.softmax(1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: softplus(logits, threshold=100).sqrt(),
    "identity": lambda logits: logits.where(logits > -torch.inf, 0),
}


def runs_on(device: str) -> bool:
    return True


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
    y, order = y[: offsets[-1]], order[: offsets[-1]]
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


def sort_by_expert(topk_idx: Tensor, num_experts: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    E, idx = num_experts, topk_idx.long()
    filled = (idx >= 0) & (idx < E) & (True if mask is None else mask[:, None])
    ids = idx.masked_fill(~filled, E).reshape(-1)
    counts = torch.bincount(ids, minlength=E + 1)
    return ids.argsort(stable=True), counts.cumsum(0) - counts


def add_at(total: Tensor, index: Tensor, values: Tensor | None) -> None:
    """total[index[n]] += values[n], or 1. Sorted by index first, so that sums have one order on every device."""
    counts = torch.bincount(index, minlength=len(total))
    if values is not None:
        counts = torch.segment_reduce(values[index.argsort(stable=True)], "sum", lengths=counts)
    total.add_(counts)
