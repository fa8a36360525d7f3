"""The part of the reference that is about an expert beside the others of its token; see `reference`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moekern.kernels.sums import MixtureSums

LEAST_REST = 1e-6  # what is left of a token's shares without one of them, at least


def mixture_stats(
    y: Tensor, topk_weight: Tensor, share: Tensor, topk_idx: Tensor, order: Tensor, offsets: Tensor,
    mask: Tensor | None, sums: MixtureSums | None, gram: Tensor | None,
) -> None:  # fmt: skip
    """Add a batch to MixtureSums and to gram [E, E] float64, in place, in float64; either may be None.

    The arguments are as for combine_and_measure; share [T, K] floating is what the token's filled slots are weighed by.
    With p = gate·y of a slot, c = Σ p of its token and w its share divided by the sum of the token's (0 where that is
    0), the sums take d = ‖p - w c‖₂, d², l = d / max(1 - w, LEAST_REST) and l² for the slot's expert, and of each token
    the sum of its shares and its square. gram takes <pᵢ, pⱼ> for each ordered pair of a token's rows of different
    experts, and ‖p‖² on the diagonal.
    """
    (T, K), E = topk_idx.shape, len(offsets) - 1
    y, order, idx = y[: offsets[-1]], order[: offsets[-1]], topk_idx.long()
    row_of = torch.full((T * K,), -1, device=y.device).index_put_((order,), torch.arange(len(y), device=y.device))
    row_of = row_of.view(T, K) if mask is None else row_of.view(T, K).masked_fill(~mask[:, None], -1)
    filled = row_of >= 0
    gate, given = (torch.where(filled, of_slots, 0).double() for of_slots in (topk_weight, share))
    total = given.sum(1, keepdim=True)
    w = torch.where(total == 0, 0, given / total)
    apart, dots = gate.new_zeros(T, K), gate.new_zeros(T, K, K)
    for start in range(0, T if len(y) else 0, 64):
        part = slice(start, start + 64)
        p = gate[part, :, None] * y[row_of[part].clamp(min=0)].double().masked_fill(~filled[part, :, None], 0)
        apart[part] = (p - w[part, :, None] * p.sum(1, keepdim=True)).norm(dim=2)
        dots[part] = p @ p.mT
    if sums is not None:
        left = apart / (1 - w).clamp(min=LEAST_REST)
        for name, of_rows in (("mixture", apart), ("left_out", left)):
            add_at(getattr(sums, f"{name}_norm_sum"), idx[filled], of_rows[filled])
            add_at(getattr(sums, f"{name}_square_sum"), idx[filled], of_rows[filled] ** 2)
        sums.share_sum.add_(total.sum())
        sums.share_square_sum.add_(total.square().sum())
    if gram is not None:
        i, j = idx[:, :, None].expand(-1, K, K), idx[:, None, :].expand(-1, K, K)
        pairs = filled[:, :, None] & filled[:, None, :] & ((i != j) | torch.eye(K, dtype=torch.bool, device=y.device))
        add_at(gram.view(-1), (i * E + j)[pairs], dots[pairs])


def add_at(total: Tensor, index: Tensor, values: Tensor | None) -> None:
    """total[index[n]] += values[n], or 1. Sorted by index first, so that sums have one order on every device."""
    counts = torch.bincount(index, minlength=len(total))
    if values is not None:
        counts = torch.segment_reduce(values[index.argsort(stable=True)], "sum", lengths=counts)
    total.add_(counts)
