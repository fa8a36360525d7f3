"""A choice between plans by what they cost on held-back text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekern.evaluation.losses import METRICS, ORIGINAL, Evaluation, Metric, difference, error_of, mean_of
from moekern.plan.document import Plan
from moekern.plan.groups import model_digest
from moekern.rows import with_error

CHOICE = "choice"  # in a plan's provenance


def by_nearness(table: Evaluation) -> list[str]:
    """Plans, the one that is nearest to the original (least KL, mean over domains) first."""
    return sorted((name for name in table if name != ORIGINAL), key=lambda name: mean_of(table[name], "kl"))


def alike(plans: Mapping[str, Plan]) -> dict[str, str]:
    """Name -> the first name of a plan that makes the same model, whatever the scores and where it came from."""
    first: dict[str, str] = {}
    return {name: first.setdefault(model_digest(plan), name) for name, plan in plans.items()}


def choice_document(table: Evaluation, same: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Which plan of a table is nearest to the original, and how all of them did: for its provenance, or as JSON.

    `same` names plans that are not in the table since they keep what another one keeps. What a candidate is farther
    than the chosen one, in KL, is paired by sequence, with an interval of 95 %.
    """
    names = by_nearness(table)
    best = table[names[0]]
    candidates: dict[str, Any] = {}
    for name in names:
        row, found = table[name], difference(table[name], best, "kl")
        told: dict[str, Any] = {metric: mean_of(row, metric) for metric in METRICS}
        told |= {f"{metric}_error": error_of(row, metric) for metric in METRICS}
        if name != names[0]:
            told["farther"] = {"mean": found.mean, "interval": found.interval, "clear": found.clear}
        candidates[name] = told
    for name, other in (same or {}).items():
        if name != other:
            candidates[name] = {"same_as": other}
    return {
        "chosen": names[0],
        "by": "kl",
        "domains": sorted(best),
        "sequences": sum(loss.sequences for loss in best.values()),
        "tokens": sum(loss.tokens for loss in best.values()),
        "candidates": candidates,
    }


def choice_rows(document: Mapping[str, Any]) -> list[Sequence[str]]:
    """A row for each candidate, best first: loss, KL, top-1, how much farther it is than the chosen one."""
    rows: list[Sequence[str]] = []
    for name, told in document["candidates"].items():
        if "same_as" in told:
            rows.append((name, "-", "-", "-", f"the same experts as {told['same_as']}"))
            continue
        farther = told.get("farther")
        rows.append((
            name, *(figure_text(metric, told[metric], told[f"{metric}_error"]) for metric in METRICS),
            "chosen" if farther is None else _farther(farther),
        ))  # fmt: skip
    return rows


COLUMNS = ("loss", "KL to original", "same top-1", "farther by (95 % interval, paired)")


def figure_text(metric: Metric, value: float, error: float | None) -> str:
    """A figure with its standard error, where it has one."""
    return with_error(value, error, ".1%" if metric == "top1" else ".4f")


def _farther(told: Mapping[str, Any]) -> str:
    low, high = told["interval"]
    if low is None:
        return f"{told['mean']:.4f}: one sequence tells no interval"
    return f"{told['mean']:.4f} ({low:.4f} to {high:.4f})" + ("" if told["clear"] else ": not told apart")


def doubt_of(document: Mapping[str, Any]) -> str | None:
    """The line that says which candidates the text does not tell from the chosen one; None where it tells all."""
    told = document["candidates"].items()
    rest = [name for name, each in told if not each.get("farther", {"clear": True})["clear"]]
    if not rest:
        return None
    return (
        f"{document['sequences']} sequences are too few to tell {', '.join(rest)} from {document['chosen']}: "
        "more text would, and either may be taken"
    )
