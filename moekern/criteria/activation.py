"""Scores from the per-dimension sums of expert outputs and from outlier counts: [E] float64, higher is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.criteria.needs import idle_lowest, need, others
from moekern.statistics.layer import LayerStatistics


def ean_dim(statistics: LayerStatistics) -> Tensor:
    """Σⱼ sqrt(Σ yⱼ²): norm over the tokens of each output dimension j, then summed (EAN of MC-Suite, eq. 13)."""
    need(statistics, "ean_dim", "square_sum")
    return idle_lowest(statistics, statistics.square_sum.sqrt().sum(1))


def eas(statistics: LayerStatistics) -> Tensor:
    """-Σ over other experts q of the mean cosine of all pairs (output of p, output of q) (EAS of MC-Suite).

    The mean over all pairs of tokens is the inner product of the two experts' mean unit vectors, exactly. Experts like
    the others are dropped first (arXiv:2504.05586, Fig. 12).
    """
    need(statistics, "eas", "unit_sum")
    unit = statistics.unit_sum / statistics.count.clamp(min=1)[:, None]
    return idle_lowest(statistics, -others(unit @ unit.T))


def variances(statistics: LayerStatistics) -> Tensor:
    """[E, H] variance over the routed tokens of each output dimension, never below the least normal number."""
    count = statistics.count.clamp(min=1)[:, None]
    spread = statistics.square_sum / count - (statistics.value_sum / count).square()
    rounding = torch.finfo(torch.float64).eps * statistics.square_sum  # what sums of equal numbers may leave
    spread = torch.where(spread > rounding, spread, 0.0)
    return spread.clamp(min=torch.finfo(torch.float64).tiny)


def eae(statistics: LayerStatistics) -> Tensor:
    """Σⱼ log σⱼ, σⱼ the standard deviation over tokens of output dimension j (EAE of MC-Suite, arXiv:2504.05586).

    A dimension that never varies counts as the least normal number, so an expert with one token scores very low.
    """
    need(statistics, "eae", "value_sum", "square_sum")
    return idle_lowest(statistics, variances(statistics).log().sum(1) / 2)


def eao(statistics: LayerStatistics) -> Tensor:
    """Entries of the outputs beyond μ ± 3σ, μ and σ over all of the expert's entries (EAO of MC-Suite).

    Counted exactly, in a second pass over the text with the μ and σ of the first (arXiv:2504.05586).
    """
    need(statistics, "eao", "outlier_sum")
    return idle_lowest(statistics, statistics.outlier_sum.double())


def mone(statistics: LayerStatistics) -> Tensor:
    """sqrt(Σⱼ Var yⱼ) x Σ gate, both over the expert's routed tokens (MoNE, arXiv:2507.00390).

    The gates are summed, as in the official code, not averaged over the expert's own tokens.
    """
    need(statistics, "mone", "value_sum", "square_sum")
    return idle_lowest(statistics, variances(statistics).sum(1).sqrt() * statistics.gate_sum)
