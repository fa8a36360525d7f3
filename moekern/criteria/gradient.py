"""Scores from gradients of the loss, where one G is an expert's gradient over a domain: [E] float64, higher is kept.

Sums over several G (domains, runs) are sums of the G's own values; they rank as their means do.
"""

from __future__ import annotations

from torch import Tensor

from moekern.criteria.needs import idle_lowest, need, others
from moekern.statistics.layer import LayerStatistics


def egs(statistics: LayerStatistics) -> Tensor:
    """-Σ over other experts of cos(G_p, G_q), all matrices flattened (EGS of MC-Suite, arXiv:2504.05586).

    The paper prints the formula and leaves the direction open; as for weights, experts like the others go first.
    """
    need(statistics, "egs", "gradient_cosine_sum")
    return idle_lowest(statistics, -others(statistics.gradient_cosine_sum))


def ege(statistics: LayerStatistics) -> Tensor:
    """Σⱼ log σ(Gʲ) over the hidden dimensions j (EGE of MC-Suite, arXiv:2504.05586; the least are dropped first)."""
    need(statistics, "ege", "gradient_log_std_sum")
    return idle_lowest(statistics, statistics.gradient_log_std_sum)


def ego(statistics: LayerStatistics) -> Tensor:
    """Entries of G beyond μ ± 3σ (EGO of MC-Suite, arXiv:2504.05586); the fewest are dropped first."""
    need(statistics, "ego", "gradient_outlier_sum")
    return idle_lowest(statistics, statistics.gradient_outlier_sum.double())


def egn(statistics: LayerStatistics) -> Tensor:
    """‖G‖_F (EGN of MC-Suite, arXiv:2504.05586); the smallest are dropped first."""
    need(statistics, "egn", "gradient_norm_sum")
    return idle_lowest(statistics, statistics.gradient_norm_sum)


def taylor(statistics: LayerStatistics) -> Tensor:
    """|<W, G>|: first-order change of the loss when the expert's weights become zero (arXiv:1611.06440)."""
    need(statistics, "taylor", "taylor_sum")
    return idle_lowest(statistics, statistics.taylor_sum.abs())


def gate_taylor(statistics: LayerStatistics) -> Tensor:
    """-Σ gate ∂loss/∂gate: first-order rise of the loss when the expert's gate becomes zero on every token.

    An estimate of leaving the expert out, without the router's choice of another; it may be negative.
    """
    need(statistics, "gate_taylor", "gate_gradient_sum")
    return idle_lowest(statistics, -statistics.gate_gradient_sum)
