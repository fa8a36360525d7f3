"""The stage that merges: what becomes of the experts that stay, a file a layer, for pruning to put in their places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moekern.architectures import find_layout
from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError
from moekern.estimation.refit import refitted_bytes
from moekern.merging.tensors import check_plain, merged_layer
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.groups import aligned, merge_recipe, merged_into
from moekern.plan.refit import REFIT, kept_digest
from moekern.pruning.refitted import SUFFIX, open_refitted, remove_others, write_layer


def merge_experts(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> Plan:
    """Compute the experts that a plan's groups make, and write them to `folder`, a file for each layer.

    Returns the plan that names them, for `prune(..., refitted=folder)`. A layer's tensors are held at a time. Layers
    that an earlier call has written are taken over. Raises InputError for a plan that does not fit or merges nothing,
    and for experts that are not plain numbers.
    """
    layout = find_layout(checkpoint)
    check_plan(plan, layout, checkpoint)
    if not plan.merges:
        raise InputError("plan: no layer has groups, so that no expert is merged; `prune` drops experts")
    check_plain(checkpoint, layout, plan)
    align, recipe = aligned(plan.provenance), merge_recipe(plan, checkpoint.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    remove_others(folder, recipe)
    left = open_refitted(folder).kept if any(folder.glob(f"[!.]*{SUFFIX}")) else {}
    groups = {key: layer.groups for key, layer in plan.layers.items() if layer.groups is not None}
    for done, key in enumerate(groups):
        progress(done, len(groups))
        if left.get(key) != kept_digest(plan.layers[key]):
            made = merged_layer(checkpoint, layout.layers[key], plan.layers[key], align=align)
            write_layer(folder, key, made, recipe=recipe, kept=plan.layers[key], model=checkpoint.fingerprint)
    progress(len(groups), len(groups))
    told = {key: {"merged": merged_into(each)} for key, each in groups.items()}
    return replace(plan, provenance={**plan.provenance, REFIT: {"recipe": recipe, "layers": told}})


def merged_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Bytes of what `merge_experts` writes at most."""
    layout = find_layout(checkpoint)
    kept = {k: len(layer.keep) for k, layer in plan.layers.items() if layer.groups is not None and k in layout.layers}
    return refitted_bytes(checkpoint, layout, kept, all_parts=True)
