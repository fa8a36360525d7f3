"""What `evaluate --out` has measured, as a table of a model card: the original beside the model, with n and errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moekern.checkpoint.strict_json import short
from moekern.errors import InputError
from moekern.plan.document import Plan
from moekern.plan.groups import model_digest
from moekern.publishing.markdown import plain, table
from moekern.rows import with_error

ORIGINAL = "original"  # the row of the model that was not pruned
LIMIT = 1e9  # no figure is beyond
LOSSES = {"nll": ("loss, nats a token", ".4f"), "kl": ("KL to the original", ".4f"), "top1": ("same top-1", ".2%")}


@dataclass(frozen=True)
class Figure:
    """A figure of a model: over what it is a mean, its standard error where it has one, and how it is written."""

    measure: str
    over: str
    model: str
    value: float
    error: float | None
    form: str = ".4f"


def figures_of(document: Mapping[str, Any], source: str) -> list[Figure]:
    """Of losses, scores at tasks, or continuations. Raises InputError, which begins with `source`, for any other."""
    readers: Mapping[str, Callable[[Any], Iterator[Figure]]] = {
        "losses": _losses, "scores": _scores, "figures": _continued,
    }  # fmt: skip
    for key, read in readers.items():
        if key in document:
            try:
                found = list(read(document[key]))
            except (AttributeError, KeyError, TypeError, ValueError):
                found = []
            if found:
                return found
    what = "no losses, scores or continuations that `moekern evaluate ... --out FILE.json` has written"
    raise InputError(f"{source}: {what}")


def models_of(document: Mapping[str, Any]) -> dict[str, Mapping[str, str]]:
    """Row -> {"fingerprint": of the checkpoint} or {"plan": `model_digest` of the plan, "fingerprint": of what that was
    made on}, as far as they are told."""
    found = document.get("models")
    rows = found.items() if isinstance(found, Mapping) else ()
    return {name: told for name, told in rows if isinstance(told, Mapping) and all(map(_is_text, told.values()))}


def is_of(told: Mapping[str, str] | None, plan: Plan) -> bool:
    """Whether what is told of a row is that it is of this plan, made on the same original as far as that is told."""
    if told is None or told.get("plan") != model_digest(plan):
        return False
    made_on = plan.provenance.get("fingerprint")
    return made_on is None or told.get("fingerprint", made_on) == made_on


def other_original(models: Mapping[str, Mapping[str, str]], made_on: object, source: str) -> str | None:
    """The line for figures beside an original whose fingerprint is not the one that a plan was `made_on`; None where
    they are the same, or one is not told."""
    found = models.get(ORIGINAL, {}).get("fingerprint")
    if found is None or made_on is None or found == made_on:
        return None
    prints = f"fingerprint {short(found[:12])}, and of the plan's {short(str(made_on)[:12])}"
    return f"{source}: its original is another one ({prints}): a twin of the same model, or figures of another"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _losses(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[Figure]:
    for model, row in found.items():
        for domain, loss in row.items():
            over = f"{_count(loss['tokens']):,} tokens in {_count(loss['sequences']):,} sequences of {domain}"
            for key, (words, form) in LOSSES.items():
                read = _share if key == "top1" else _number
                if model != ORIGINAL or key == "nll":
                    yield Figure(words, over, model, read(loss[key]), _error(loss[f"{key}_error"]), form)


def _scores(found: list[Mapping[str, Any]]) -> Iterator[Figure]:
    for score in found:
        shots = "" if score["shots"] is None else f", {_count(score['shots'])} shots"
        over = "not told" if score["questions"] is None else f"{_count(score['questions']):,} questions"
        measure = f"{score['task']}{shots}: {score['metric']}"
        measure += "" if score["filter"] == "none" else f", {score['filter']}"
        yield Figure(measure, over, str(score["model"]), _number(score["value"]), _error(score["stderr"]))


def _continued(found: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> Iterator[Figure]:
    for decoding, models in found.items():
        for model, measures in models.items():
            for name, each in measures.items():
                over = f"{_count(each['prompts']):,} prompts"
                yield Figure(f"{decoding}: {name}", over, model, _number(each["value"]), _error(each["error"]))


def _number(value: Any) -> float:
    """NaN for what is no number of a sound measurement, and for null, as which JSON has it."""
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise ValueError
    return float(value) if abs(value) < LIMIT else math.nan


def _error(value: Any) -> float | None:
    if value is None:
        return None
    found = _number(value)
    if found < 0:
        raise ValueError
    return found


def _share(value: Any) -> float:
    found = _number(value)
    if found < 0 or found > 1:
        raise ValueError
    return found


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 60:
        raise ValueError
    return value


def row_of(figures: list[Figure], row: str | None, source: str) -> str:
    """The row that is the model's: the one that is named, or the only one beside the original's. Raises InputError."""
    names = list(dict.fromkeys(each.model for each in figures if each.model != ORIGINAL))
    listed = ", ".join(map(short, names)) or "none"
    if row is not None and row not in names:
        raise InputError(f"--row {row}: {source} has no such row; beside the original's it has {listed}")
    if row is None and len(names) != 1:
        raise InputError(f"--row: name which row of {source} is this model's: {listed}")
    return names[0] if row is None else row


def evaluation_table(figures: list[Figure], row: str) -> str:
    """Markdown: a row for each measure, of the original and of the model."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for each in figures:
        if each.model in (ORIGINAL, row):
            cells.setdefault((each.measure, each.over), {})[each.model] = with_error(each.value, each.error, each.form)
    rows = [
        (plain(measure), plain(over), found.get(ORIGINAL, ""), found.get(row, ""))
        for (measure, over), found in cells.items()
    ]
    return table(("measure", "over", "original", "this model"), rows)
