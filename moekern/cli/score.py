"""The command `score`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moekern.cli import console
from moekern.cli.console import show
from moekern.cli.given import check_statistics, result, statistics_of
from moekern.cli.options import CriterionOption, Domains, Json, Seed, StatisticsFile
from moekern.cli.plan import with_tiers
from moekern.criteria.table import DEFAULT


def score(
    statistics: StatisticsFile,
    criterion: CriterionOption = DEFAULT,
    domain: Domains = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show the best and the worst experts of each layer with their scores (--json: all of them); higher is kept."""
    check_statistics(statistics)

    from moekern.plan.scores import score as scored

    scores = scored(statistics_of(statistics, [criterion]), criterion, domain, seed).layers
    result({"criterion": criterion, "layers": scores}, lambda: show_scores(criterion, scores))


def show_scores(criterion: str, layers: Mapping[str, Sequence[float]]) -> None:
    """Per layer, experts from the best to the worst."""
    rows = []
    for key, values in layers.items():
        order = sorted(range(len(values)), key=lambda e: (-values[e], e))
        listed = [f"{e}:{values[e]:.3g}" for e in order]
        ends = max(2, min(8, (console.columns() - 16) // 22))  # a score takes up to 11 columns
        short = listed if len(listed) <= 2 * ends else [*listed[:ends], "...", *listed[-ends:]]
        rows.append((key, " ".join(short)))
    show(f"{with_tiers(criterion)}, best first (expert:score)", ("layer", "experts"), rows)
