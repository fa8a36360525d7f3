"""Every criterion by name. A score is a function of statistics; a selector chooses the kept set as a whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from moekern.criteria import scores
from moekern.criteria.selectors import Selection, hope, hope_all_tokens
from moekern.errors import InputError
from moekern.statistics import LayerStatistics

__all__ = ["CRITERIA", "Criterion", "Selection", "criterion_named", "score_layer"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One way to choose experts.

    kind "score": function(LayerStatistics) -> [E] float64, higher is kept.
    kind "selector": function(LayerStatistics, kept, groups, protected) -> Selection.
    kind "seeded": function(experts, seed, layer key) -> [E] float64.
    `needs` names fields that calibration can leave out.
    """

    name: str
    function: Callable[..., Any]
    kind: Literal["score", "selector", "seeded"]
    meaning: str
    paper: str
    needs: tuple[str, ...] = ()


CRITERIA: dict[str, Criterion] = {
    c.name: c
    for c in (
        Criterion("usage", scores.usage, "score", "share of tokens routed to the expert (EUF)", "arXiv:2504.05586"),
        Criterion("gate_mass", scores.gate_mass, "score", "sum of gates (SEER-MoE)", "arXiv:2404.05089"),
        Criterion("ean", scores.ean, "score", "sum of output norms (EAN, per token)", "arXiv:2510.13999"),
        Criterion(
            "ean_dim",
            scores.ean_dim,
            "score",
            "norm over tokens of each output dimension, summed (EAN of MC-Suite)",
            "arXiv:2504.05586",
            needs=("square_sum",),
        ),
        Criterion("reap", scores.reap, "score", "mean gate x norm (REAP)", "arXiv:2510.13999"),
        Criterion("man", scores.man, "score", "mean output norm (MAN)", "arXiv:2606.15716"),
        Criterion("msan", scores.msan, "score", "mean squared output norm (MSAN)", "arXiv:2606.15716"),
        Criterion("gated_norm", scores.gated_norm, "score", "sum of gate x norm", "arXiv:2606.15716"),
        Criterion("gated_square", scores.gated_square, "score", "sum of (gate x norm) squared", "arXiv:2606.15716"),
        Criterion("hope", hope, "selector", "least joint gate x norm of the dropped set (HOPE)", "arXiv:2609.18916"),
        Criterion(
            "hope_all_tokens",
            hope_all_tokens,
            "selector",
            "least joint gate x norm, averaged over all tokens (HOPE's bound)",
            "arXiv:2609.18916",
        ),
        Criterion("random", scores.random, "seeded", "uniform numbers from --seed; a baseline", ""),
    )
}


def criterion_named(name: str) -> Criterion:
    """The criterion, or InputError with the names there are."""
    if name not in CRITERIA:
        raise InputError(f"--criterion {name}: unknown; known are {', '.join(CRITERIA)}")
    return CRITERIA[name]


def score_layer(criterion: Criterion, statistics: LayerStatistics, key: str, seed: int = 0) -> Tensor:
    """[E] float64, higher is kept. A selector scores the cost of dropping each expert alone."""
    if criterion.kind == "seeded":
        return criterion.function(statistics.num_experts, seed, key)
    if criterion.kind == "selector":
        return criterion.function(statistics, statistics.num_experts).scores
    return criterion.function(statistics)
