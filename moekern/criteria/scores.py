"""Scores from routing, gates and norms: [E] float64, higher is kept. Pure: statistics in, scores out.

Notation: over the tokens routed to an expert, g is the gate and ‖y‖ the L2 norm of the output before the gate. Most
scores are members of S(b, α, β) = Σ gᵅ ‖y‖ᵝ / countᵇ (HTS, arXiv:2606.15716). An expert that no token chose scores
lowest.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from moekern.criteria.needs import idle_lowest, lowest_but, mean, need
from moekern.errors import InputError
from moekern.kernels import popcount
from moekern.statistics.layer import LayerStatistics

# (α, β) -> the sum that calibration keeps of gᵅ ‖y‖ᵝ
MOMENTS: dict[tuple[float, float], str] = {
    (0, 0): "count",
    (1, 0): "gate_sum",
    (2, 0): "gate_square_sum",
    (0, 1): "norm_sum",
    (0, 2): "norm_square_sum",
    (1, 1): "gated_norm_sum",
    (2, 2): "gated_norm_square_sum",
}


def hts(statistics: LayerStatistics, b: float, alpha: float, beta: float) -> Tensor:
    """S(b, α, β) = Σ gᵅ ‖y‖ᵝ / countᵇ (arXiv:2606.15716). Raises InputError for exponents that are not accumulated."""
    if (alpha, beta) not in MOMENTS:
        known = ", ".join(f"({a:g},{c:g})" for a, c in MOMENTS)
        raise InputError(f"hts({b:g},{alpha:g},{beta:g}): (alpha, beta) must be one of {known}")
    total = getattr(statistics, MOMENTS[alpha, beta]).double()
    return idle_lowest(statistics, total / statistics.count.clamp(min=1).double() ** b)


def usage(statistics: LayerStatistics) -> Tensor:
    """Share of the tokens that chose the expert, S(0, 0, 0) / tokens (EUF of MC-Suite, arXiv:2504.05586)."""
    return idle_lowest(statistics, statistics.count.double() / statistics.tokens.clamp(min=1))


def gate_mass(statistics: LayerStatistics) -> Tensor:
    """Σ g, S(0, 1, 0) (soft count of SEER-MoE, arXiv:2404.05089)."""
    return hts(statistics, 0, 1, 0)


def ean(statistics: LayerStatistics) -> Tensor:
    """Σ ‖y‖, S(0, 0, 1) (EAN as REAP's paper defines it, arXiv:2510.13999)."""
    return hts(statistics, 0, 0, 1)


def reap(statistics: LayerStatistics) -> Tensor:
    """Mean of g ‖y‖, S(1, 1, 1) (arXiv:2510.13999), with the gates that the model itself multiplies by."""
    return hts(statistics, 1, 1, 1)


def reap_renormalised(statistics: LayerStatistics) -> Tensor:
    """Mean of g' ‖y‖, g' = g / Σ of the token's gates (recommended in REAP's README, arXiv:2510.13999)."""
    need(statistics, "reap_renormalised", "renormalised_norm_sum")
    return mean(statistics, statistics.renormalised_norm_sum)


def reap_compat(statistics: LayerStatistics) -> Tensor:
    """REAP's numbers as its reference code took them until March 2026, for comparison only.

    The K largest raw logits are taken as the choice and their softmax over all experts as gates, whatever the model's
    router does: biases, groups, sigmoid scores and scaling are left out (arXiv:2510.13999, observer of the repository).
    Since then that code renormalises the gates where the model does; `reap`, with the model's own gates, always has.
    """
    need(statistics, "reap_compat", "compat_gated_norm_sum")
    count = statistics.compat_count
    return lowest_but((count > 0) | (statistics.count > 0), statistics.compat_gated_norm_sum / count.clamp(min=1))


def man(statistics: LayerStatistics) -> Tensor:
    """Mean of ‖y‖, S(1, 0, 1) (mean activation norm, arXiv:2606.15716)."""
    return hts(statistics, 1, 0, 1)


def msan(statistics: LayerStatistics) -> Tensor:
    """Mean of ‖y‖², S(1, 0, 2) (mean squared activation norm, arXiv:2606.15716)."""
    return hts(statistics, 1, 0, 2)


def gated_norm(statistics: LayerStatistics) -> Tensor:
    """Σ g ‖y‖, S(0, 1, 1) (arXiv:2606.15716)."""
    return hts(statistics, 0, 1, 1)


def gated_square(statistics: LayerStatistics) -> Tensor:
    """Σ (g ‖y‖)², S(0, 2, 2) (arXiv:2606.15716)."""
    return hts(statistics, 0, 2, 2)


def evtc(statistics: LayerStatistics) -> Tensor:
    """How many distinct token ids were routed to the expert (EVTC of MC-Suite, arXiv:2504.05586).

    The paper divides by the vocabulary's size, which ranks alike.
    """
    need(statistics, "evtc", "vocabulary")
    return idle_lowest(statistics, popcount(statistics.vocabulary).double())


def easy_ep(statistics: LayerStatistics) -> Tensor:
    """Σ g ‖y‖ max(1 - cos(h, h + MoE(h)), 0), h the residual stream before the block (EASY-EP, arXiv:2504.06792)."""
    if not statistics.residual_tokens.any() and statistics.tokens.any():
        raise InputError("easy_ep: the residual stream was not seen in this model, so there is no residual_sum")
    return idle_lowest(statistics, statistics.residual_sum)


def random(experts: int, seed: int, key: str) -> Tensor:
    """Uniform in [0, 1), a function of seed, layer key and expert number alone, the same on every machine."""
    digests = (hashlib.sha256(f"{seed}/{key}/{e}".encode()).digest() for e in range(experts))
    return torch.tensor([(int.from_bytes(d[:8], "big") >> 11) / 2**53 for d in digests], dtype=torch.float64)
