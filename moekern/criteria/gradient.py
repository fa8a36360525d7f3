"""Scores from gradients of the loss: [E] float64, higher is kept.

G is an expert's gradient, one for all the text that is looked at: a domain, or all domains of one run. Of several runs,
or of some domains of a run, no G is known, and all but the linear scores (taylor, gate_taylor) are refused.
"""

from __future__ import annotations

from torch import Tensor

from moekern.criteria.needs import idle_lowest, need, others
from moekern.errors import InputError
from moekern.statistics.layer import LayerStatistics


def _of_one(statistics: LayerStatistics, criterion: str, field: str) -> Tensor:
    """`field` of the one G that these sums are of: a domain's own, or the joint one. Raises InputError for none."""
    need(statistics, criterion, field)
    several = int(statistics.gradients)
    if several <= 1:
        return getattr(statistics, field)  # type: ignore[no-any-return]
    if not statistics.joint_gradients.numel():
        raise InputError(
            f"{criterion}: the statistics hold no joint gradient of their {several} domains; calibrate again with "
            "--tier gradient, or take one domain"
        )
    united = statistics.joint_gradient_norm.any() or not statistics.gradient_norm_sum.any()
    if int(statistics.joint_gradients) != several or not united:
        raise InputError(
            f"{criterion}: of these {several} gradients no joint one is known: take one domain or all domains of one "
            "run, not some and not merged runs"
        )
    return getattr(statistics, f"joint_{field.removesuffix('_sum')}")  # type: ignore[no-any-return]


def egs(statistics: LayerStatistics) -> Tensor:
    """-Σ over other experts of cos(G_p, G_q), all matrices flattened (EGS of MC-Suite, arXiv:2504.05586).

    The paper prints the formula and leaves the direction open; as for weights, experts like the others go first.
    """
    return idle_lowest(statistics, -others(_of_one(statistics, "egs", "gradient_cosine_sum")))


def ege(statistics: LayerStatistics) -> Tensor:
    """Σⱼ log σ(Gʲ) over the hidden dimensions j (EGE of MC-Suite, arXiv:2504.05586; the least are dropped first)."""
    return idle_lowest(statistics, _of_one(statistics, "ege", "gradient_log_std_sum"))


def ego(statistics: LayerStatistics) -> Tensor:
    """Entries of G beyond μ ± 3σ (EGO of MC-Suite, arXiv:2504.05586); the fewest are dropped first.

    The paper leaves the direction open.
    """
    return idle_lowest(statistics, _of_one(statistics, "ego", "gradient_outlier_sum").double())


def egn(statistics: LayerStatistics) -> Tensor:
    """‖G‖_F (EGN of MC-Suite, arXiv:2504.05586); the smallest are dropped first."""
    return idle_lowest(statistics, _of_one(statistics, "egn", "gradient_norm_sum"))


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
