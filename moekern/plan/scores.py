"""The scores of all layers by one criterion, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moekern.criteria import criterion_named, score_layer
from moekern.criteria.table import DEFAULT
from moekern.errors import check_type
from moekern.rows import Row, html_table, write_csv
from moekern.statistics.file import Statistics


@dataclass(frozen=True, repr=False)
class Scores:
    """layers: layer key -> a score for each expert; higher is kept."""

    criterion: str
    layers: Mapping[str, Sequence[float]]

    def __repr__(self) -> str:
        return f"Scores({self.criterion}, {len(self.layers)} layers)"

    def _repr_html_(self) -> str:
        return html_table(repr(self), self.to_rows())

    def to_rows(self) -> list[Row]:
        """A row an expert: layer, expert, score, and its rank in the layer, 0 the best, ties by number."""
        rows: list[Row] = []
        for key, values in self.layers.items():
            order = sorted(range(len(values)), key=lambda e, values=values: (-values[e], e))  # type: ignore[misc]
            ranks = {expert: rank for rank, expert in enumerate(order)}
            rows += [{"layer": key, "expert": e, "score": value, "rank": ranks[e]} for e, value in enumerate(values)]
        return rows

    def to_csv(self, path: str | Path) -> None:
        """Write the same rows to a file."""
        write_csv(self.to_rows(), path)


def score(
    statistics: Statistics, criterion: str = DEFAULT, domains: Sequence[str] | None = None, seed: int = 0
) -> Scores:
    """Score every expert: E numbers (float64) a layer, higher is kept. domains: count these only. seed: of `random`.

    One layer is held at a time. Raises InputError for a criterion that nobody knows or whose tier was not measured,
    and for an unknown domain; TypeError where `statistics` are none.
    """
    check_type("statistics", statistics, Statistics)
    chosen = criterion_named(criterion)
    layers = ((key, statistics.layer(key, domains, chosen.tiers)) for key in statistics.layers)
    return Scores(criterion, {key: score_layer(chosen, sums, key, seed).tolist() for key, sums in layers})
