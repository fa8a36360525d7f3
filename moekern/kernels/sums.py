"""What router_stats and combine_and_measure add to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class RouterSums(NamedTuple):
    """Sums over the counted tokens of one MoE layer. p is a token's score divided by its sum over the experts."""

    tokens: Tensor  # [1] int64     counted tokens
    logit_tokens: Tensor  # [1] int64     of these, tokens whose logits were given
    count: Tensor  # type: ignore[assignment]  # [E] int64     slots routed to e
    top1_count: Tensor  # [E] int64     tokens whose largest gate is e's
    gate_sum: Tensor  # [E] float64   Σ gate
    gate_square_sum: Tensor  # [E] float64   Σ gate²
    score_sum: Tensor  # [E] float64   Σ score, of all experts and not only the chosen
    entropy_sum: Tensor  # [1] float64   Σ -Σₑ p ln p, in nats
    margin_sum: Tensor  # [1] float64   Σ k-th largest score - (k+1)-th, 0 where K = E
    coactivation: Tensor  # [E, E] int64  tokens that chose both; count on the diagonal
    logit_gram: Tensor  # [E, E] float64  Σ lᵢlⱼ of the logits as given; [0, 0] is not measured


class ExpertSums(NamedTuple):
    """Sums over the counted rows of one MoE layer. norm is a row's ‖y‖₂ before the gate, a = gate·norm."""

    norm_sum: Tensor  # [E] float64     Σ norm
    norm_square_sum: Tensor  # [E] float64     Σ norm²
    gated_norm_sum: Tensor  # [E] float64     Σ a
    gated_norm_square_sum: Tensor  # [E] float64     Σ a²
    max_abs: Tensor  # [E] float64     largest |y|: merges by maximum
    pair_sum: Tensor  # [E, E] float64  Σ over tokens of aᵢaⱼ; Σ a² on the diagonal
    square_sum: Tensor  # [E, H] float64  Σ y² of each dimension; these three are [E, 0] where not measured
    value_sum: Tensor  # [E, H] float64  Σ y
    unit_sum: Tensor  # [E, H] float64  Σ y/norm, without rows of norm 0
    residual_sum: Tensor  # [E] float64     Σ a·max(0, 1 - cos(h, h + out)), h the residual stream
    residual_tokens: Tensor  # [1] int64       counted tokens whose residual was given


def router_sums(E: int, device: torch.device | str = "cpu", *, gram: bool = False) -> RouterSums:
    """Zeros for E experts; without `gram` logit_gram is left unmeasured."""
    G = E if gram else 0
    shapes = ((1,), (1,), (E,), (E,), (E,), (E,), (E,), (1,), (1,), (E, E), (G, G))
    whole = {"tokens", "logit_tokens", "count", "top1_count", "coactivation"}
    return RouterSums(*_zeros(RouterSums._fields, shapes, whole, device))


def expert_sums(E: int, H: int = 0, device: torch.device | str = "cpu") -> ExpertSums:
    """Zeros for E experts; H = 0 leaves the sums of each dimension unmeasured."""
    shapes = ((E,), (E,), (E,), (E,), (E,), (E, E), (E, H), (E, H), (E, H), (E,), (1,))
    return ExpertSums(*_zeros(ExpertSums._fields, shapes, {"residual_tokens"}, device))


def _zeros(
    names: Iterable[str], shapes: Iterable[tuple[int, ...]], whole: set[str], device: torch.device | str
) -> Iterator[Tensor]:
    for name, shape in zip(names, shapes, strict=True):
        yield torch.zeros(shape, dtype=torch.int64 if name in whole else torch.float64, device=device)
