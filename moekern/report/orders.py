"""Which experts go first: the orders that a report shows, of plans and of criteria that the statistics serve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from moekern.criteria import CRITERIA, Criterion, criterion_named, score_layer
from moekern.criteria.table import DEFAULT
from moekern.errors import InputError
from moekern.plan.document import Plan
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics

FIRST = (DEFAULT, "reap", "usage", "gated_square", "hope_all_tokens", "rcs_loo", "ean", "gate_mass")
Values = dict[str, list[float]]  # layer key -> a number an expert


@dataclass(frozen=True)
class Order:
    """A score for each expert of each layer, higher is kept, and what of it a plan keeps (None: no plan)."""

    name: str
    criterion: str  # as a person reads it
    scores: Values
    plan: Plan | None = None
    known: Criterion | None = None  # None where it cannot be scored again

    def keep(self, key: str) -> tuple[int, ...] | None:
        return None if self.plan is None else self.plan.layers[key].keep


def criterion_of(plan: Plan) -> Criterion | None:
    """The criterion that a plan names. None where it names none, or one that nobody knows, or code in a file: a report
    runs none that a plan asks for."""
    text = plan.provenance.get("criterion")
    if isinstance(text, str) and ":" not in text:
        with suppress(InputError):
            return criterion_named(text)
    return None


def served(statistics: Statistics) -> list[Criterion]:
    """Criteria with a score an expert that the measured tiers serve, the well-known ones first."""
    measured = set(statistics.tiers)
    rows = [row for row in CRITERIA.values() if row.kind == "score" and set(row.tiers) <= measured]
    return sorted(rows, key=lambda row: FIRST.index(row.name) if row.name in FIRST else len(FIRST))


def wanted(statistics: Statistics, plans: Mapping[str, Plan]) -> list[Criterion]:
    """What is scored: criteria of the plans, then those that are served."""
    named = [found for plan in plans.values() if (found := criterion_of(plan)) is not None]
    usable = [found for found in named if found.kind != "seeded" and set(found.tiers) <= set(statistics.tiers)]
    return list({row.name: row for row in (*usable, *served(statistics))}.values())


def scored(criteria: list[Criterion], sums: LayerStatistics, key: str) -> Iterator[tuple[str, Tensor]]:
    """Name -> scores [E] of one layer, without criteria that have nothing to say of it."""
    for criterion in criteria:
        with suppress(InputError):
            yield criterion.name, score_layer(criterion, sums, key)


def orders(statistics: Statistics, plans: Mapping[str, Plan], scores: Mapping[str, Values]) -> list[Order]:
    """The order of each plan: by the scores in it, else those of its criterion, else of the first that is served.
    Without plans, the orders of the first criteria. Raises InputError for scores that are not one an expert."""
    if not plans:
        return [Order(name, name, scores[name], known=CRITERIA[name]) for name in list(scores)[:3]]
    found = []
    for name, plan in plans.items():
        known, own = criterion_of(plan), _own(name, plan, statistics)
        text = str(plan.provenance.get("criterion", "")) or "not named"
        if own is not None:
            found.append(Order(name, text, own, plan, known))
        elif known is not None and known.name in scores:
            found.append(Order(name, text, scores[known.name], plan, known))
        else:
            first = next(iter(scores))
            found.append(Order(name, f"{text}, in the order of {first}", scores[first], plan, known))
    return found


def _own(name: str, plan: Plan, statistics: Statistics) -> Values | None:
    """The scores that a plan holds; None where a layer has none."""
    found: Values = {}
    for key in statistics.layers:
        row, E = plan.layers[key].scores, statistics.num_experts(key)
        if row is None:
            return None
        if len(row) != E:
            raise InputError(f"{name}: layer {key}: {len(row)} scores, but it has {E} experts")
        found[key] = list(row)
    return found
