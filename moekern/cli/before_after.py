"""Losses before and after something, for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moekern.cli.console import show

if TYPE_CHECKING:
    from moekern.evaluation.losses import Loss, Metric

    Row = Mapping[str, Loss]  # by domain
    Pair = tuple[Row, Row]  # before and after; empty where there was no text

METRICS: tuple[Metric, ...] = ("nll", "kl", "top1")
COLUMNS = ("loss, nats a token", "KL to original", "same top-1")


def pairs_document(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """Name -> before and after -> domain -> loss."""
    from moekern.evaluation.losses import row_document

    return {
        name: {"before": row_document(before), "after": row_document(after)} for name, (before, after) in pairs.items()
    }


def show_pairs(title: str, of: str, pairs: Mapping[str, Pair], *, against: bool = True) -> None:
    """A row for each pair: means over domains. of: what text the rows are; against: whether there was an original."""
    rows = []
    for name, (before, after) in pairs.items():
        if before:
            count = sum(loss.tokens for loss in before.values())
            cells = (_cell(metric, before, after) if against or metric == "nll" else "-" for metric in METRICS)
            rows.append((f"{count} tokens that {name}", *cells))
    if rows:
        show(title, (of, *COLUMNS), rows)


def _cell(metric: Metric, *pair: Row) -> str:
    from moekern.evaluation.losses import mean_of

    means = (mean_of(row, metric) for row in pair)
    return " -> ".join(f"{value:.1%}" if metric == "top1" else f"{value:.4f}" for value in means)
