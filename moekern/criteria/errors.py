"""Standard errors of scores, from the second moments that statistics hold."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moekern.criteria.scores import MOMENTS, hts
from moekern.criteria.table import Criterion
from moekern.statistics.layer import LayerStatistics

EXPONENTS: dict[str, tuple[float, float, float]] = {  # b, alpha, beta of S
    "usage": (0, 0, 0),
    "gate_mass": (0, 1, 0),
    "ean": (0, 0, 1),
    "gated_norm": (0, 1, 1),
    "man": (1, 0, 1),
    "reap": (1, 1, 1),
}
SQUARES: dict[tuple[float, float], str] = {
    (0, 0): "count",
    (1, 0): "gate_square_sum",
    (0, 1): "norm_square_sum",
    (1, 1): "gated_norm_square_sum",
}


def standard_errors(criterion: Criterion, statistics: LayerStatistics) -> Tensor | None:
    """[E] float64: by how much a score would vary with other text of the same kind and size; None where the statistics
    hold no second moment of it.

    With x a token's summand, 0 where it did not choose the expert, Var(Σ x) = Σ x² - (Σ x)² / T over T tokens, and
    Var(mean) = (Σ x² - (Σ x)² / n) / (n (n - 1)) over the n that chose it: infinite for n < 2. Tokens count as
    independent: those of a sequence are not, so that errors are larger than these.
    """
    b, alpha, beta = _exponents(criterion) or (-1.0, 0.0, 0.0)
    square = SQUARES.get((alpha, beta))
    if b not in (0, 1) or square is None:
        return None
    n, T = statistics.count.double(), statistics.tokens.double().clamp(min=1)
    total, squares = getattr(statistics, MOMENTS[alpha, beta]).double(), getattr(statistics, square).double()
    if b == 0:
        error = (squares - total.square() / T).clamp(min=0).sqrt()
        return error / T if criterion.name == "usage" else error
    variance = (squares - total.square() / n.clamp(min=1)).clamp(min=0) / (n * (n - 1)).clamp(min=1)
    return torch.where(n < 2, torch.inf, variance.sqrt())


def _exponents(criterion: Criterion) -> tuple[float, float, float] | None:
    function = criterion.function
    if isinstance(function, partial) and function.func is hts:
        return function.keywords["b"], function.keywords["alpha"], function.keywords["beta"]
    return EXPONENTS.get(criterion.name) if criterion.family != "plug-in" else None
