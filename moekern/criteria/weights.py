"""Scores from the weights alone: [E] float64, higher is kept. They need no text, so no expert is idle to them."""

from __future__ import annotations

from torch import Tensor

from moekern.criteria.needs import cosines, need, others
from moekern.statistics.layer import LayerStatistics


def ews(statistics: LayerStatistics) -> Tensor:
    """-Σ over other experts of cos(W_p, W_q), all matrices flattened (EWS of MC-Suite, arXiv:2504.05586, Fig. 15)."""
    need(statistics, "ews", "weight_gram")
    return -others(cosines(statistics.weight_gram))


def rwn(statistics: LayerStatistics) -> Tensor:
    """-‖router row‖₂: the loudest rows are dropped first (RWN of MC-Suite, arXiv:2504.05586, Table 1)."""
    need(statistics, "rwn", "router_gram")
    return -statistics.router_gram.diagonal().clamp(min=0).sqrt()


def wsr(statistics: LayerStatistics) -> Tensor:
    """-Σ σ² / σ₁², the mean over gate, up and down (WSR of MC-Suite, arXiv:2504.05586), stored in one tensor or apart.

    The paper found that dominant experts have a low stable rank, so high ones are dropped first.
    """
    need(statistics, "wsr", "weight_stable_rank")
    return -statistics.weight_stable_rank


def ewn(statistics: LayerStatistics) -> Tensor:
    """‖W‖_F over all matrices of the expert (EWN of MC-Suite, arXiv:2504.05586; the smallest are dropped first)."""
    need(statistics, "ewn", "weight_square_sum")
    return statistics.weight_square_sum.sqrt()


def aimer(statistics: LayerStatistics) -> Tensor:
    """-mean |w| / RMS(w) over all matrices of the expert: flat weights are dropped first (AIMER, arXiv:2603.18492)."""
    need(statistics, "aimer", "weight_square_sum")
    count = statistics.weight_count.clamp(min=1)
    rms = (statistics.weight_square_sum / count).sqrt()
    return -(statistics.weight_abs_sum / count) / rms.clamp(min=1e-300)
