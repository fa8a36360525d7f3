"""The C++ extension, op by op: the same bits for every number of threads and every instruction set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekern import _C

if TYPE_CHECKING:
    from moekern.kernels import ExpertSums, RouterSums, SimilaritySums


def router_stats(
    logits: Tensor | None, topk_idx: Tensor, topk_weight: Tensor, mask: Tensor | None, sums: RouterSums, *, score: str,
    level: str = "",
) -> None:  # fmt: skip
    _C.router_stats(logits, topk_idx, topk_weight, mask, *sums, score, torch.get_num_threads(), level)


def combine_and_measure(
    y: Tensor, topk_weight: Tensor, topk_idx: Tensor, order: Tensor, offsets: Tensor, mask: Tensor | None,
    sums: ExpertSums, *, level: str = "",
) -> Tensor:  # fmt: skip
    out = y.new_empty(len(topk_idx), y.shape[1])
    squares = sums.square_sum if sums.square_sum.shape[1] else None
    _C.combine_and_measure(
        y, topk_weight, topk_idx, order, offsets, mask, sums.norm_sum, sums.norm_square_sum, sums.gated_norm_sum,
        sums.gated_norm_square_sum, sums.max_abs, sums.pair_sum, squares, out, torch.get_num_threads(), level,
    )  # fmt: skip
    return out


def similarity(
    y: Tensor, norm_square: Tensor | None, mask: Tensor | None, sums: SimilaritySums, *, level: str = ""
) -> None:
    _C.similarity(y, norm_square, mask, *sums, torch.get_num_threads(), level)


def sketch(y: Tensor, size: int, *, seed: int, start: int, level: str = "") -> tuple[Tensor, Tensor]:
    E, T, _ = y.shape
    z, norm_square = torch.empty(E, T, size), torch.empty(E, T)
    _C.sketch(y, z, norm_square, seed, start, torch.get_num_threads(), level)
    return z, norm_square


def vocabulary(token_ids: Tensor, topk_idx: Tensor, mask: Tensor | None, bits: Tensor) -> None:
    _C.vocabulary(token_ids, topk_idx, mask, bits, torch.get_num_threads())


def popcount(bits: Tensor, *, level: str = "") -> Tensor:
    count = bits.new_empty(len(bits))
    _C.popcount(bits, count, torch.get_num_threads(), level)
    return count


def pair_popcount(bits: Tensor, *, level: str = "") -> Tensor:
    count = bits.new_empty(len(bits), len(bits))
    _C.pair_popcount(bits, count, torch.get_num_threads(), level)
    return count
