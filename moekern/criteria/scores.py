"""Scores of one layer's experts: [E] float64, higher is kept. Pure: statistics in, scores out.

Notation: over the tokens routed to an expert, g is the gate and ‖y‖ the L2 norm of the output before the gate. Most
scores are members of S(b, α, β) = Σ gᵅ ‖y‖ᵝ / countᵇ (arXiv:2606.15716). An expert that no token chose scores lowest.
"""

import hashlib

import torch
from torch import Tensor

from moekern.errors import InputError
from moekern.statistics import LayerStatistics


def idle_lowest(statistics: LayerStatistics, scores: Tensor) -> Tensor:
    """`scores` [E] with every idle expert (count 0) at one finite value, at least 1 below zero and all the others."""
    used = statistics.count > 0
    lowest = torch.where(used, scores, 0.0).min()
    return torch.where(used, scores, lowest - lowest.abs().clamp(min=1))


def _mean(statistics: LayerStatistics, total: Tensor) -> Tensor:
    return idle_lowest(statistics, total / statistics.count.clamp(min=1))


def usage(statistics: LayerStatistics) -> Tensor:
    """Share of the tokens that chose the expert, S(0, 0, 0) / tokens (EUF of MC-Suite, arXiv:2504.05586)."""
    return idle_lowest(statistics, statistics.count.double() / statistics.tokens.clamp(min=1))


def gate_mass(statistics: LayerStatistics) -> Tensor:
    """Σ g, S(0, 1, 0) (soft count of SEER-MoE, arXiv:2404.05089)."""
    return idle_lowest(statistics, statistics.gate_sum)


def ean(statistics: LayerStatistics) -> Tensor:
    """Σ ‖y‖, S(0, 0, 1) (EAN as REAP's paper defines it, arXiv:2510.13999)."""
    return idle_lowest(statistics, statistics.norm_sum)


def ean_dim(statistics: LayerStatistics) -> Tensor:
    """Σⱼ sqrt(Σ yⱼ²): norm over the tokens of each output dimension j, then summed (EAN of MC-Suite, eq. 13).

    Raises InputError when the statistics hold no per-dimension sums.
    """
    if statistics.dimensions == 0:
        raise InputError("ean_dim: the statistics hold no per-dimension sums (square_sum); calibrate with them")
    return idle_lowest(statistics, statistics.square_sum.sqrt().sum(1))


def reap(statistics: LayerStatistics) -> Tensor:
    """Mean of g ‖y‖, S(1, 1, 1) (arXiv:2510.13999), with the gates that the model itself multiplies by."""
    return _mean(statistics, statistics.gated_norm_sum)


def man(statistics: LayerStatistics) -> Tensor:
    """Mean of ‖y‖, S(1, 0, 1) (mean activation norm, arXiv:2606.15716)."""
    return _mean(statistics, statistics.norm_sum)


def msan(statistics: LayerStatistics) -> Tensor:
    """Mean of ‖y‖², S(1, 0, 2) (mean squared activation norm, arXiv:2606.15716)."""
    return _mean(statistics, statistics.norm_square_sum)


def gated_norm(statistics: LayerStatistics) -> Tensor:
    """Σ g ‖y‖, S(0, 1, 1) (arXiv:2606.15716)."""
    return idle_lowest(statistics, statistics.gated_norm_sum)


def gated_square(statistics: LayerStatistics) -> Tensor:
    """Σ (g ‖y‖)², S(0, 2, 2) (arXiv:2606.15716)."""
    return idle_lowest(statistics, statistics.gated_norm_square_sum)


def random(experts: int, seed: int, key: str) -> Tensor:
    """Uniform in [0, 1), a function of seed, layer key and expert number alone, the same on every machine."""
    digests = (hashlib.sha256(f"{seed}/{key}/{e}".encode()).digest() for e in range(experts))
    return torch.tensor([(int.from_bytes(d[:8], "big") >> 11) / 2**53 for d in digests], dtype=torch.float64)
