"""Losses of plans as commands show them: how sure they are, and which plans the text tells apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import combinations
from typing import Any

from moekern.cli.console import say, show
from moekern.evaluation.buckets import AXES, bucket_rows
from moekern.evaluation.choice import COLUMNS, by_nearness, choice_document, choice_rows, doubt_of, figure_text
from moekern.evaluation.layers import mean_layers
from moekern.evaluation.losses import (
    ORIGINAL,
    Difference,
    Evaluation,
    Loss,
    Metric,
    Row,
    difference,
    error_of,
    is_known,
    losses_document,
    mean_of,
)
from moekern.plan.document import Plan
from moekern.plan.groups import model_digest

WORST = 5  # layers that are shown of each plan
PAIRED: tuple[Metric, ...] = ("kl", "nll")


def judged_document(table: Evaluation) -> dict[str, Any]:
    """Losses by plan and domain; for each two plans how much more the first one has, paired by sequence; and by plan
    and domain what was found in buckets of tokens and, where asked for, in each layer."""
    pairs = [
        {"plan": one, "than": other, "metric": metric, **_told(difference(table[one], table[other], metric))}
        for one, other in combinations(by_nearness(table)[::-1], 2)
        for metric in PAIRED
    ]
    found = {"losses": losses_document(table), "differences": pairs}
    found |= {f"by_{axis}": _of_each(table, partial(_buckets, axis)) for axis in AXES}
    if any(loss.layers for row in table.values() for loss in row.values()):
        found["layers"] = _of_each(table, _layers)
    return found


def models_judged(original: str, plans: Mapping[str, Plan]) -> dict[str, dict[str, str]]:
    """What each row is of: the original's fingerprint, the digest of the model that a plan makes with the fingerprint
    that the plan names, or else the original's."""
    made_on = {name: str(plan.provenance.get("fingerprint", original)) for name, plan in plans.items()}
    return {
        ORIGINAL: {"fingerprint": original},
        **{name: {"plan": model_digest(plan), "fingerprint": made_on[name]} for name, plan in plans.items()},
    }


def _of_each(table: Evaluation, function: Callable[[Loss], Any]) -> dict[str, Any]:
    return {name: {domain: function(loss) for domain, loss in row.items()} for name, row in table.items()}


def _buckets(axis: str, loss: Loss) -> list[dict[str, Any]]:
    return [] if loss.buckets is None else bucket_rows(axis, loss.buckets[axis])


def _layers(loss: Loss) -> dict[str, Any]:
    return {key: asdict(each) for key, each in (loss.layers or {}).items()}


def _told(found: Difference) -> dict[str, Any]:
    low, high = found.interval
    return {"mean": found.mean, "low": low, "high": high, "clear": found.clear}


def judged_rows(table: Evaluation) -> list[Mapping[str, Any]]:
    """A row for each plan and domain, and then for each bucket and layer: what it is of stands under `axis` (text,
    position, entropy or layer), `from` and `to`; columns that another axis has are empty."""
    rows = list(_rows(table))
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _rows(table: Evaluation) -> Iterator[dict[str, Any]]:
    cells = [(name, domain, loss) for name, row in table.items() for domain, loss in row.items()]
    document = losses_document(table)
    for name, domain, _ in cells:
        yield {"plan": name, "domain": domain, "axis": "text", "from": None, "to": None, **document[name][domain]}
    for axis in AXES:
        for name, domain, loss in cells:
            yield from ({"plan": name, "domain": domain, "axis": axis, **bucket} for bucket in _buckets(axis, loss))
    for name, domain, loss in cells:
        for key, each in _layers(loss).items():
            yield {"plan": name, "domain": domain, "axis": "layer", "from": key, "to": key, **each}


def show_judged(table: Evaluation, title: str = "held-out loss, nats a token") -> None:
    """Loss per domain, a row a plan, with standard errors by sequence; then what the text does and does not tell, and
    the layers that are farthest from the original's."""
    domains = list(next(iter(table.values())))
    several = domains if len(domains) > 1 else []
    bits = all(is_known(row, "bits_per_byte") for row in table.values())
    rows = [
        (
            name,
            *(f"{row[d].nll:.4f}" for d in several),
            figure(row, "nll"),
            *((f"{mean_of(row, 'bits_per_byte'):.4f}",) if bits else ()),
            *(("-", "-", "-") if name == ORIGINAL else _beside(row)),
        )
        for name, row in table.items()
    ]
    columns = ("mean" if several else "loss", *(("bits a byte",) if bits else ()), "KL to original", "1 - TV")
    show(title, ("plan", *several, *columns, "same top-1"), rows)
    if len(table) > 2:
        show_choice("which is nearest to the original", choice_document(table))
    worst = [line for name, row in table.items() if name != ORIGINAL for line in _worst(name, row)]
    if worst:
        show(f"layers whose output is farthest from the original's, {WORST} of each plan at the most", LAYERS, worst)


LAYERS = ("plan", "layer", "relative error", "cosine", "orphans", "busiest expert", "same first", "same choice")


def _beside(row: Row) -> tuple[str, str, str]:
    known = is_known(row, "one_minus_tv")
    return figure(row, "kl"), f"{mean_of(row, 'one_minus_tv'):.1%}" if known else "-", figure(row, "top1")


def _worst(name: str, row: Row) -> list[tuple[str, ...]]:
    forms = {"error": ".4f", "cosine": ".4f", "orphans": ".2%", "load": ".2f", "same_top1": ".1%", "overlap": ".1%"}
    found = mean_layers(row)
    worst = sorted(found, key=lambda key: -(found[key].error or 0))[:WORST]
    return [(name, key, *(_told_figure(getattr(found[key], n), form) for n, form in forms.items())) for key in worst]


def _told_figure(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def untold(table: Evaluation, written: bool) -> Iterator[str]:
    """Lines about what is not in the tables; `written`: the rest is in a file."""
    if not all(is_known(row, "bits_per_byte") for row in table.values()):
        yield "bits a byte: not told, since no tokenizer.json of the model says how many bytes its tokens stand for"
    if not written:
        yield "--out FILE (.json or .csv) has all of it also by position and by entropy of the original"


def show_choice(title: str, document: Mapping[str, Any], what: str = "plan") -> None:
    """Candidates, best first, and which of them the text does not tell from the best."""
    show(title, (what, *COLUMNS), choice_rows(document))
    if line := doubt_of(document):
        say(line)


def figure(row: Row, metric: Metric) -> str:
    """A mean over domains with its standard error, where it has one."""
    return figure_text(metric, mean_of(row, metric), error_of(row, metric))
