"""Losses of plans as commands show them: how sure they are, and which plans the text tells apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations
from typing import Any

from moekern.cli.console import say, show
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

PAIRED: tuple[Metric, ...] = ("kl", "nll")


def by_nearness(table: Evaluation) -> list[str]:
    """Plans, the one that is nearest to the original first."""
    return sorted((name for name in table if name != ORIGINAL), key=lambda name: mean_of(table[name], "kl"))


def judged_document(table: Evaluation) -> dict[str, Any]:
    """Losses by plan and domain, and for each two plans how much more the first one has, paired by sequence."""
    pairs = [
        {"plan": one, "than": other, "metric": metric, **_told(difference(table[one], table[other], metric))}
        for one, other in combinations(by_nearness(table)[::-1], 2)
        for metric in PAIRED
    ]
    return {"losses": losses_document(table), "differences": pairs}


def _told(found: Difference) -> dict[str, Any]:
    """As JSON, which knows no infinity."""
    return {k: v if abs(v) < float("inf") else None for k, v in asdict(found).items()} | {"clear": found.clear}


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
    for line in told_apart(table):
        say(line)


def figure(row: Row, metric: Metric) -> str:
    """A mean over domains with its standard error, where it has one."""
    mean, error, form = mean_of(row, metric), error_of(row, metric), ".1%" if metric == "top1" else ".4f"
    return f"{mean:{form}}" + ("" if error is None else f" ± {error:{form}}")


def told_apart(table: Evaluation) -> list[str]:
    """Which plan is nearest to the original, by how much, and which others the text does not tell from it."""
    names = by_nearness(table)
    if len(names) < 2:
        return []
    first, sequences = names[0], sum(loss.sequences for loss in table[names[0]].values())
    found = {name: difference(table[name], table[first], "kl") for name in names[1:]}
    clear = [f"{n} by {d.mean:.4f} ({d.low:.4f} to {d.high:.4f})" for n, d in found.items() if d.clear]
    lines = [f"nearest to the original (KL): {first}"]
    if clear:
        lines[0] += f"; farther are, with 95 % intervals of the paired difference: {', '.join(clear)}"
    if rest := [name for name, d in found.items() if not d.clear]:
        lines.append(
            f"warning: {sequences} sequences are too few to tell {', '.join(rest)} from {first}; give more text, or "
            "take either"
        )
    return lines
