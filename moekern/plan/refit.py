"""What a plan says of the layers that were refitted: which, and by which recipe their tensors were computed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekern.checkpoint.strict_json import short
from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.groups import merged_into

REFIT = "refit"  # provenance
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RefitRecord:
    """recipe: sha256 of all that decides the computed bytes. layers: key -> what is told of the layer, whatever it is;
    only tensors of these layers' experts may be computed ones."""

    recipe: str
    layers: Mapping[str, Any]


def refit_of(plan: Plan) -> RefitRecord | None:
    """`provenance.refit` as {"recipe": sha256, "layers": {key: ...}, ...}; None where the plan has none.

    Raises InputError for anything odd.
    """
    found = plan.provenance.get(REFIT)
    if found is None:
        return None
    recipe, layers = (found.get(key) if isinstance(found, Mapping) else None for key in ("recipe", "layers"))
    if not isinstance(recipe, str) or not is_sha256(recipe):
        raise InputError(f"plan: provenance.refit.recipe: expected a sha256, got {short(recipe)}")
    if not isinstance(layers, Mapping) or not layers:
        raise InputError(f"plan: provenance.refit.layers: expected an object of layers, got {short(layers)}")
    for key in layers:
        if key not in plan.layers:
            raise InputError(f"plan: provenance.refit.layers: the plan has no layer {short(key)}")
    return RefitRecord(recipe, layers)


def check_merged(plan: Plan) -> None:
    """Raise InputError for a plan that merges experts of a layer whose weights it does not say were computed."""
    record = refit_of(plan)
    computed = {} if record is None else record.layers
    for key in (key for key, layer in plan.layers.items() if merged_into(layer) and key not in computed):
        what = f"merges experts, whose weights are computed, and does not say that those of layer {short(key)} were"
        does = "`moekern merge-experts MODEL --plan PLAN --out OUT` does that, and so does `refit`"
        raise InputError(f"plan: {what}: {does}; use the plan that they write")


def kept_digest(layer: LayerPlan) -> str:
    """sha256 of which experts and channels of a layer stay, and of what is merged into them."""
    merged = [] if layer.groups is None else [layer.groups]
    return hashlib.sha256(json.dumps([layer.keep, layer.channels, *merged]).encode()).hexdigest()


def is_sha256(value: object) -> bool:
    return isinstance(value, str) and SHA256.fullmatch(value) is not None
