"""What `evaluate --out` has written, read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekern.checkpoint.strict_json import read_json
from moekern.errors import InputError
from moekern.evaluation.losses import METRICS, ORIGINAL, Evaluation, error_of, mean_of, row_of

PAIR = {"plan": str, "than": str, "metric": str, "clear": bool}
LIMIT = 1e9  # no loss is beyond, nor is NaN below
ENDS = ("mean", "low", "high")


def read_losses(path: str | Path) -> dict[str, Any]:
    """The document: "losses" and "differences". Raises InputError for any other file."""
    document = read_json(Path(path))
    problem = losses_problem(document)
    if problem:
        hint = "name the file that `moekern evaluate MODEL PLANS --data TEXT --out losses.json` has written"
        raise InputError(f"--evaluation {path}: no losses of plans ({problem}); {hint}")
    return document


def losses_problem(document: Mapping[str, Any]) -> str | None:
    """Why a document is not what `evaluate` writes of losses; None when it is."""
    losses, pairs = document.get("losses"), document.get("differences", [])
    if not isinstance(losses, dict) or not losses or not all(isinstance(row, dict) and row for row in losses.values()):
        return "expected losses by plan and domain"
    if len({tuple(row) for row in losses.values()}) > 1:
        return "its rows are of different domains"
    try:
        table = {name: row_of(row) for name, row in losses.items()}
    except TypeError:
        return "a loss has other fields"
    for row in table.values():
        for loss in row.values():
            figures = [getattr(loss, name) for name in METRICS]
            errors = [getattr(loss, f"{name}_error") for name in METRICS]
            if not all(map(_number, figures)) or not all(each is None or _number(each) for each in errors):
                return "a loss is no number"
            if type(loss.tokens) is not int or type(loss.sequences) is not int or loss.sums is not None:
                return "a count is no number"
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) and _is_pair(pair, table) for pair in pairs):
        return "differences: expected pairs of its plans"
    return None


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LIMIT


def _is_pair(pair: Mapping[str, Any], table: Evaluation) -> bool:
    ends = all(name in pair and (pair[name] is None or _number(pair[name])) for name in ENDS)
    typed = all(isinstance(pair.get(name), kind) for name, kind in PAIR.items())
    return typed and ends and pair["plan"] in table and pair["than"] in table and pair["mean"] is not None


def told(document: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The table and the pairs, by the `names` that plans have in the report."""
    table = {name: row_of(row) for name, row in document["losses"].items()}
    first = next(iter(table.values()))
    rows = [
        {
            "name": names.get(name, name),
            "domains": {d: {m: _figure(getattr(loss, m), getattr(loss, f"{m}_error")) for m in METRICS}
                        for d, loss in row.items()},
            **{metric: _figure(mean_of(row, metric), error_of(row, metric)) for metric in METRICS},
        }
        for name, row in table.items()
    ]  # fmt: skip
    pairs = [
        {**pair, **{end: names.get(pair[end], pair[end]) for end in ("plan", "than")}}
        for pair in document.get("differences", [])
    ]
    return {
        "domains": list(first),
        "tokens": sum(loss.tokens for loss in first.values()),
        "sequences": sum(loss.sequences for loss in first.values()),
        "original": ORIGINAL if ORIGINAL in table else None,
        "rows": rows,
        "pairs": pairs,
    }


def _figure(value: float, error: float | None) -> dict[str, float | None]:
    return {"value": value, "error": error}


def warnings_of(found: Mapping[str, Any], plans: list[str]) -> list[str]:
    """What is to be doubted about an evaluation, beside the plans of a report."""
    lines = []
    measured = {row["name"] for row in found["rows"]}
    missing = [name for name in plans if name not in measured]
    if plans and len(missing) == len(plans):
        lines.append("the evaluation names none of these plans: it may be of others")
    elif missing:
        lines.append(f"the evaluation holds no losses of {', '.join(missing)}")
    alike = [pair for pair in found["pairs"] if pair["metric"] == "kl" and not pair["clear"]]
    if alike:
        some = "; ".join(f"{pair['plan']} and {pair['than']}" for pair in alike[:4])
        more = f" and {len(alike) - 4} pairs more" if len(alike) > 4 else ""
        lines.append(f"{found['sequences']} sequences do not tell these plans apart by KL: {some}{more}")
    return lines
