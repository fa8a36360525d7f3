"""What the tests of mixture_stats share."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern import kernels
from moekern.kernels import MixtureSums, native
from tests.helpers.cases import Rows
from tests.helpers.ops import U, assert_within, to

Mixed = tuple[MixtureSums, Tensor]


def mixed(
    args: Rows, E: int, device: str = "cpu", backend: str | None = None, *, sums: bool = True, gram: bool = True,
    level: str | None = None,
) -> Mixed:  # fmt: skip
    """Sums and Gram matrix of a batch; with a level those of that instruction set."""
    found, both = kernels.mixture_sums(E, device), torch.zeros(E, E, dtype=torch.float64, device=device)
    parts = found if sums else None, both if gram else None
    if level is None:
        kernels.mixture_stats(*to(device, args), *parts, backend=backend)
    else:
        native.mixture_stats(args.y, args.topk_weight, args.topk_weight, *args[2:], *parts, level=level)
    return MixtureSums(*to("cpu", found)), both.cpu()


def assert_mixtures_agree(got: Mixed, want: Mixed, args: Rows) -> None:
    """Within what float32 changes of a row's sums: H columns in lanes of H / 16 and some, tokens in float64.

    p and w Σ p are wrong by K + 3 roundings of Σ |p|, which is at most the mixture's length in all rows, so a distance
    by that, and its quotient by 1 - w by that over 1 - w.
    """
    K, H = args.topk_idx.shape[1], args.y.shape[1]
    row = (H / 16 + 24) * U
    counted = torch.ones(len(args.topk_idx), dtype=torch.bool) if args.mask is None else args.mask
    slot = args.order[: args.offsets[-1]]
    p = torch.zeros(counted.numel() * K, dtype=torch.float64)
    p[slot] = args.topk_weight.reshape(-1)[slot].double() * args.y[: len(slot)].double().norm(dim=1)
    length = p.view(-1, K).sum(1)  # at least what the mixture and each row in it are long
    filled = torch.zeros_like(p).index_fill_(0, slot, 1).view(-1, K)
    share = torch.where(filled > 0, args.topk_weight.double(), 0)
    rest = (1 - share / share.sum(1, keepdim=True).clamp(min=1e-300)).clamp(min=1e-6)
    off = (row * length + (K + 3) * U * length)[:, None].expand(-1, K)
    expert, E = args.topk_idx.reshape(-1).long()[slot], len(args.offsets) - 1

    def total(of_slots: Tensor) -> Tensor:
        of_slots = (of_slots * counted[:, None]).reshape(-1)[slot]
        return torch.zeros(E, dtype=torch.float64).index_add_(0, expert, of_slots)

    by_rest = off / rest + 8 * U * (length[:, None] / rest**2)
    assert_within(got[0].mixture_norm_sum, want[0].mixture_norm_sum, total(off), "mixture_norm_sum")
    assert_within(got[0].left_out_norm_sum, want[0].left_out_norm_sum, total(by_rest), "left_out_norm_sum")
    twice = 2 * length[:, None]
    assert_within(got[0].mixture_square_sum, want[0].mixture_square_sum, total(off * twice), "mixture_square_sum")
    assert_within(
        got[0].left_out_square_sum, want[0].left_out_square_sum, total(by_rest * twice / rest), "left squares"
    )
    torch.testing.assert_close(got[0].share_sum, want[0].share_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(got[0].share_square_sum, want[0].share_square_sum, rtol=1e-12, atol=0)
    norm = want[1].diagonal().sqrt()  # a pair's products add up to at most norm_i norm_j
    assert_within(got[1], want[1], (2 * row + 4 * U) * norm[:, None] * norm, "gram")
