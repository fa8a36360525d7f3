"""Losses of plans as commands show them: how sure they are, and which plans the text tells apart."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from moekern.cli.console import say, show
from moekern.evaluation.choice import COLUMNS, by_nearness, choice_document, choice_rows, doubt_of
from moekern.evaluation.losses import (
    ORIGINAL,
    Difference,
    Evaluation,
    Metric,
    Row,
    difference,
    error_of,
    losses_document,
    mean_of,
)
from moekern.rows import with_error

PAIRED: tuple[Metric, ...] = ("kl", "nll")


def judged_document(table: Evaluation) -> dict[str, Any]:
    """Losses by plan and domain, and for each two plans how much more the first one has, paired by sequence."""
    pairs = [
        {"plan": one, "than": other, "metric": metric, **_told(difference(table[one], table[other], metric))}
        for one, other in combinations(by_nearness(table)[::-1], 2)
        for metric in PAIRED
    ]
    return {"losses": losses_document(table), "differences": pairs}


def _told(found: Difference) -> dict[str, Any]:
    low, high = found.interval
    return {"mean": found.mean, "low": low, "high": high, "clear": found.clear}


def judged_rows(table: Evaluation) -> list[Mapping[str, Any]]:
    """A row for each plan and domain."""
    document = losses_document(table)
    return [{"plan": name, "domain": d, **loss} for name, row in document.items() for d, loss in row.items()]


def show_judged(table: Evaluation, title: str = "held-out loss, nats a token") -> None:
    """Loss per domain, a row a plan, with standard errors by sequence; then what the text does and does not tell."""
    domains = list(next(iter(table.values())))
    several = domains if len(domains) > 1 else []
    rows = [
        (
            name,
            *(f"{row[d].nll:.4f}" for d in several),
            figure(row, "nll"),
            *(("-", "-") if name == ORIGINAL else (figure(row, "kl"), figure(row, "top1"))),
        )
        for name, row in table.items()
    ]
    show(title, ("plan", *several, "mean" if several else "loss", "KL to original", "same top-1"), rows)
    if len(table) > 2:
        show_choice("which is nearest to the original", choice_document(table))


def show_choice(title: str, document: Mapping[str, Any], what: str = "plan") -> None:
    """Candidates, best first, and which of them the text does not tell from the best."""
    show(title, (what, *COLUMNS), choice_rows(document))
    if line := doubt_of(document):
        say(line)


def figure(row: Row, metric: Metric) -> str:
    """A mean over domains with its standard error, where it has one."""
    return with_error(mean_of(row, metric), error_of(row, metric), ".1%" if metric == "top1" else ".4f")
