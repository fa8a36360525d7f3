"""Router rows of experts that others are merged into: of which rows of the source's router they are made."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moekern.architectures.channels import PLAIN
from moekern.checkpoint.strict_json import short
from moekern.errors import InputError
from moekern.plan.groups import MERGE, merged_groups

if TYPE_CHECKING:
    from moekern.architectures import Layout
    from moekern.checkpoint.folder import Checkpoint
    from moekern.plan.document import Plan

ROUTER = "router"  # in provenance.merge
DOMINANT = "dominant"  # the expert that stays has its row; the plan says nothing
LOG_SUM, LEAST_SQUARES = "log-sum", "least-squares"
FITTED = (LOG_SUM, LEAST_SQUARES)
FLOAT = "<f4"
WHERE = f"plan: provenance.{MERGE}.{ROUTER}"


class RouterRow(NamedTuple):
    """A row is the sum of coefficient x row of the source's router, over all of its experts; its bias likewise, and
    `constant` on top."""

    of: tuple[float, ...]  # by expert
    constant: float = 0.0


Rows = Mapping[int, RouterRow]  # an expert that stays -> its row


def rows_document(kind: str, layers: Mapping[str, Rows]) -> dict[str, Any]:
    """What a plan's `provenance.merge.router` says; coefficients, which are float32, as base64 of little-endian bytes:
    an expert and row takes five characters, since decimal numbers of the largest models are too many for a plan."""

    def row(one: RouterRow) -> dict[str, Any]:
        of = base64.b64encode(np.asarray(one.of, FLOAT).tobytes()).decode()
        return {"of": of} | ({"constant": one.constant} if one.constant else {})

    rows = {key: {str(e): row(one) for e, one in own.items()} for key, own in layers.items()}
    return {"target": kind, "rows": rows}


def router_rows(plan: Plan) -> dict[str, dict[int, RouterRow]]:
    """The inverse: layer -> rows; {} where those of the experts that stay are kept. Raises InputError for anything odd,
    and unless there is a row for each expert that others are merged into, and for no other."""
    told = plan.provenance.get(MERGE)
    told = told.get(ROUTER) if isinstance(told, Mapping) else None
    if told is None:
        return {}
    layers = told.get("rows") if isinstance(told, Mapping) and told.get("target") in FITTED else None
    if not isinstance(layers, Mapping) or not layers:
        raise InputError(f'{WHERE}: expected {{"target": "{LOG_SUM}", "rows": {{layer: ...}}}}, got {short(told)}')
    found = {}
    for key, rows in layers.items():
        groups = merged_groups(plan.layers[key]) if key in plan.layers else {}
        if not isinstance(rows, Mapping) or {str(e) for e in groups} != rows.keys():
            what = "expected a row for each expert of the plan that others are merged into"
            raise InputError(f"{WHERE}: layer {short(key)}: {what}, got {short(rows)}")
        found[key] = {e: _row(rows[str(e)], f"{WHERE}: layer {key}: expert {e}") for e in groups}
    return found


def routers_computed(plan: Plan, layout: Layout) -> dict[str, str]:
    """Name -> layer, of matrices and biases of the routers of which the plan has rows. Raises as `router_rows`."""
    return {t.name: key for key in router_rows(plan) for t in layout.router_tensors(key) if t is not None}


def check_routers(checkpoint: Checkpoint, layout: Layout, keys: Collection[str], kind: str | None = None) -> None:
    """Raise InputError, naming it, for a router of these layers whose rows are not known to be combined, and for a
    `kind` that its scores do not know."""
    score = layout.family.score
    if kind == LOG_SUM and score != "softmax":
        what = f"{layout.family.name}: scores of its routers are {score}, and no logit has the sum of several of them"
        raise InputError(f"--router {LOG_SUM}: {what}; take --router {LEAST_SQUARES} or {DOMINANT}")
    for key in keys:
        weight, bias = layout.router_tensors(key)
        names = [tensor.name for tensor in (weight, bias) if tensor is not None]
        entries = [checkpoint.tensors[name] for name in names]
        if weight is None or len(entries[0].shape) != 2 or any(entry.dtype not in PLAIN for entry in entries):
            what = "its router is no plain matrix of a row an expert, so that no rows are combined"
            raise InputError(f"{checkpoint.folder}: layer {key}: {what}; take --router {DOMINANT}")


def check_rows(plan: Plan, experts: Mapping[str, int]) -> None:
    """Raise InputError unless the rows of a plan are of layers with so many `experts`."""
    for key, rows in router_rows(plan).items():
        for e, row in rows.items():
            if len(row.of) != experts[key]:
                what = f"{len(row.of)} coefficients, and the layer has {experts[key]} experts"
                raise InputError(f"{WHERE}: layer {key}: expert {e}: {what}")


def _row(found: Any, where: str) -> RouterRow:
    of = found.get("of") if isinstance(found, Mapping) and found.keys() <= {"of", "constant"} else None
    try:
        values = np.frombuffer(base64.b64decode(of, validate=True), FLOAT) if isinstance(of, str) else np.empty(0)
    except ValueError:
        values = np.empty(0)
    if not len(values) or not np.isfinite(values).all():
        raise InputError(f'{where}: expected {{"of": base64 of float32, finite}}, got {short(found)}')
    constant = found.get("constant", 0.0)
    if type(constant) not in (int, float) or not math.isfinite(constant):
        raise InputError(f"{where}: constant: expected a number, got {short(constant)}")
    return RouterRow(tuple(values.tolist()), float(constant))
