"""How far an expert's outputs are from the mixture that they are part of: [E] float64, higher is kept
(RAZOR, arXiv:2609.30465).

Over the tokens routed to an expert, with w its share of the token's gates, y its output and c = Σ w y the mixture of
the routed experts (a shared one is none of them), x is
- rcs: g ‖y - c‖, g the gate itself, scaling and all;
- rcs_loo: rcs / (1 - w), what the layer's output loses when the expert alone is left out and the other gates grow to
  make up for it. 1 - w counts as 1e-6 at least.
The paper takes the root of the mean of x², `_rms`; the plain name is Σ x², which has held-out losses as low or lower
where rare experts have large outputs. Where a router's gates do not add up to one number, the others stay as they are
when one goes: x is then g ‖y‖, as in REAP. A gain of each expert (Gemma 4) is part of y, and experts that work in a
latent space are measured there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.criteria.needs import NotForLayer, idle_lowest, mean, need
from moekern.statistics.layer import LayerStatistics

SPREAD = 2.0**-8  # of tokens' sums of gates around their mean, relative: twice what rounding to bfloat16 makes of one


def rcs(statistics: LayerStatistics) -> Tensor:
    """Σ (g ‖y - c‖)²."""
    return idle_lowest(statistics, _moments(statistics, "rcs", "mixture")[1])


def rcs_sum(statistics: LayerStatistics) -> Tensor:
    """Σ g ‖y - c‖."""
    return idle_lowest(statistics, _moments(statistics, "rcs_sum", "mixture")[0])


def rcs_mean(statistics: LayerStatistics) -> Tensor:
    """Mean of g ‖y - c‖."""
    return mean(statistics, _moments(statistics, "rcs_mean", "mixture")[0])


def rcs_rms(statistics: LayerStatistics) -> Tensor:
    """Root of the mean of (g ‖y - c‖)²."""
    return _rms(statistics, _moments(statistics, "rcs_rms", "mixture")[1])


def rcs_loo(statistics: LayerStatistics) -> Tensor:
    """Σ (g ‖y - c‖ / (1 - w))²."""
    return idle_lowest(statistics, _moments(statistics, "rcs_loo", "left_out")[1])


def rcs_loo_sum(statistics: LayerStatistics) -> Tensor:
    """Σ g ‖y - c‖ / (1 - w)."""
    return idle_lowest(statistics, _moments(statistics, "rcs_loo_sum", "left_out")[0])


def rcs_loo_mean(statistics: LayerStatistics) -> Tensor:
    """Mean of g ‖y - c‖ / (1 - w)."""
    return mean(statistics, _moments(statistics, "rcs_loo_mean", "left_out")[0])


def rcs_loo_rms(statistics: LayerStatistics) -> Tensor:
    """Root of the mean of (g ‖y - c‖ / (1 - w))²."""
    return _rms(statistics, _moments(statistics, "rcs_loo_rms", "left_out")[1])


def razor(statistics: LayerStatistics) -> Tensor:
    """Root of the mean of ‖w (y - c) - v (z - c)‖² / (1 - w + v)² over the replayed tokens that chose the expert, times
    the router's scaling: z is the output of the expert that the router promotes then, v its score in shares.

    That is what the layer's output loses, the model's own router choosing again: its groups, its bias, and nobody where
    it finds none. Where gates do not add up to one number the others stay as they were, ‖w y - v z‖; what the router
    then makes of them is in `leave_one_out`, which is Σ of the squares.
    """
    need(statistics, "razor", "refill_square_sum")
    return idle_lowest(statistics, (statistics.refill_square_sum / statistics.deletion_count.clamp(min=1)).sqrt())


def _rms(statistics: LayerStatistics, squares: Tensor) -> Tensor:
    return idle_lowest(statistics, (squares / statistics.count.clamp(min=1)).sqrt())


def _moments(statistics: LayerStatistics, criterion: str, kind: str) -> tuple[Tensor, Tensor]:
    """Σ x and Σ x². Raises NotForLayer where a token has one expert, whose gate is all there is."""
    need(statistics, criterion, f"{kind}_norm_sum")
    if not sum_to_one_number(statistics):
        return statistics.gated_norm_sum, statistics.gated_norm_square_sum
    if not torch.triu(statistics.coactivation, 1).any():
        raise NotForLayer(
            f"{criterion}: a token chooses one expert here, with the same gate always, which is its whole mixture; "
            "take gated_square"
        )
    return getattr(statistics, f"{kind}_norm_sum"), getattr(statistics, f"{kind}_square_sum")


def sum_to_one_number(statistics: LayerStatistics) -> bool:
    """Whether the gates of every token (without a gain of each expert) add up to the same number."""
    total, tokens = float(statistics.share_sum), int(statistics.tokens)
    if not total or not tokens:
        return False
    return float(statistics.share_square_sum) * tokens / total**2 - 1 < SPREAD**2
