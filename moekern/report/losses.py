"""What `evaluate --out` has written, read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from moekern.checkpoint.strict_json import read_json
from moekern.errors import InputError
from moekern.evaluation.losses import METRICS, ORIGINAL

PAIR = {"plan": str, "than": str, "metric": str, "clear": bool}
LIMIT = 1e9  # no loss is beyond, nor is NaN below
ENDS = ("mean", "low", "high")
MORE = ("one_minus_tv", "bits_per_byte")  # figures of a loss that are not always measured
AXES = ("position", "entropy")  # by which tokens are told apart in buckets
LAYER = ("error", "cosine", "orphans", "load", "same_top1", "overlap")  # what is told of each layer, or None
MOST = 64, 10_000  # buckets, and layers, of a domain


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
    if not _of_domains(losses) or not losses:
        return "expected losses by plan and domain"
    if len({tuple(row) for row in losses.values()}) > 1:
        return "its rows are of different domains"
    for row in losses.values():
        for loss in row.values():
            wrong = _loss_problem(loss)
            if wrong:
                return wrong
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) and _is_pair(pair, losses) for pair in pairs):
        return "differences: expected pairs of its plans"
    kinds = {**{f"by_{axis}": _are_buckets for axis in AXES}, "layers": _are_layers}
    return next((f"{name}: not as it is written" for name, good in kinds.items()
                 if name in document and not _fits(document[name], losses, good)), None)  # fmt: skip


def _of_domains(table: Any) -> bool:
    return isinstance(table, dict) and all(isinstance(row, dict) and row for row in table.values())


def _loss_problem(loss: Any) -> str | None:
    figures = (*METRICS, *MORE)
    fields = {*figures, *(f"{x}_error" for x in figures), "tokens", "sequences"}
    if not isinstance(loss, dict) or not set(loss) <= fields:
        return "a loss has other fields"
    if not all(_number(loss.get(name)) for name in METRICS) or not all(
        _number(value) or (value is None and name not in METRICS) for name, value in loss.items()
    ):
        return "a loss is no number"
    if not all(type(loss.get(name)) is int and loss[name] >= 0 for name in ("tokens", "sequences")):
        return "a count is no number"
    shares = all(loss.get(name) is None or 0 <= loss[name] <= 1 for name in ("top1", "one_minus_tv"))
    if not shares or any(loss.get(f"{name}_error") is not None and loss[f"{name}_error"] < 0 for name in figures):
        return "a share is beyond 0 and 1, or an error below 0"
    return None


def _fits(table: Any, losses: Mapping[str, Any], good: Callable[[Any], bool]) -> bool:
    """Whether plan -> domain -> what is `good` has the plans and domains of the losses."""
    return _of_domains(table) and all(
        name in losses and set(row) == set(losses[name]) and all(good(each) for each in row.values())
        for name, row in table.items()
    )


def _are_buckets(rows: Any) -> bool:
    return isinstance(rows, list) and len(rows) <= MOST[0] and all(
        isinstance(row, dict)
        and all(_number(row.get(name)) for name in ("from", *METRICS))
        and all(row.get(name) is None or _number(row[name]) for name in ("to", *(f"{x}_error" for x in METRICS)))
        for row in rows
    )  # fmt: skip


def _are_layers(found: Any) -> bool:
    return isinstance(found, dict) and len(found) <= MOST[1] and all(
        isinstance(each, dict) and all(each.get(name) is None or _number(each[name]) for name in LAYER)
        for each in found.values()
    )  # fmt: skip


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LIMIT


def _is_pair(pair: Mapping[str, Any], table: Mapping[str, Any]) -> bool:
    ends = all(name in pair and (pair[name] is None or _number(pair[name])) for name in ENDS)
    typed = all(isinstance(pair.get(name), kind) for name, kind in PAIR.items())
    return typed and ends and pair["plan"] in table and pair["than"] in table and pair["mean"] is not None


def told(document: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The table, the pairs, and by plan what is told of buckets of tokens and of layers, by the `names` that plans have
    in the report; means over domains, each counting the same."""
    table = document["losses"]
    first = next(iter(table.values()))
    rows = [
        {
            "name": names.get(name, name),
            "domains": {d: {m: _figure([loss], m) for m in METRICS} for d, loss in row.items()},
            **{metric: _figure(list(row.values()), metric) for metric in (*METRICS, *MORE)},
        }
        for name, row in table.items()
    ]
    pairs = [
        {**pair, **{end: names.get(pair[end], pair[end]) for end in ("plan", "than")}}
        for pair in document.get("differences", [])
    ]
    return {
        "domains": list(first),
        "tokens": sum(loss["tokens"] for loss in first.values()),
        "sequences": sum(loss["sequences"] for loss in first.values()),
        "original": ORIGINAL if ORIGINAL in table else None,
        "rows": rows,
        "pairs": pairs,
        "buckets": {axis: _buckets(document.get(f"by_{axis}", {}), names, axis) for axis in AXES},
        "layers": {names.get(name, name): _layers(list(row.values()))
                   for name, row in document.get("layers", {}).items() if name != ORIGINAL},
    }  # fmt: skip


def _figure(losses: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float | None]:
    """Mean over domains of a figure with its standard error; None where a domain has none."""
    values = [loss[metric] for loss in losses if loss.get(metric) is not None]
    errors = [loss[f"{metric}_error"] for loss in losses if loss.get(f"{metric}_error") is not None]
    if len(values) < len(losses):
        return {"value": None, "error": None}
    error = sqrt(sum(each**2 for each in errors)) / len(errors) if len(errors) == len(losses) else None
    return {"value": fmean(values), "error": error}


def _buckets(table: Mapping[str, Any], names: Mapping[str, str], axis: str) -> list[dict[str, Any]]:
    """A row for each bucket, in rising order: of each plan the means over the domains that have tokens in it."""
    found: dict[float, dict[str, list[Mapping[str, Any]]]] = {}
    ends: dict[float, float | None] = {}
    for name, row in table.items():
        for bucket in (bucket for rows in row.values() for bucket in rows):
            ends[bucket["from"]] = bucket.get("to")
            found.setdefault(bucket["from"], {}).setdefault(names.get(name, name), []).append(bucket)
    return [
        {"label": _range(start, ends[start], axis), "plans": {
            name: {metric: _figure(some, metric) for metric in METRICS} for name, some in found[start].items()
        }} for start in sorted(found)
    ]  # fmt: skip


def _range(start: float, end: float | None, axis: str) -> str:
    if end is None:
        return f"from {start:g}"
    return (
        f"{start:g}" if start == end else f"{start:g} to {end:g}" if axis == "position" else f"{start:g} to < {end:g}"
    )


def _layers(domains: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Layer -> what is told of it, None where a domain does not know it."""
    keys = [key for key in domains[0] if all(key in each for each in domains)]
    return {key: {what: _figure([each[key] for each in domains], what)["value"] for what in LAYER} for key in keys}


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
