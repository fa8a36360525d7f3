"""The stage that merges: what becomes of the experts that stay, a file a layer, for pruning to put in their places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moekern.architectures import find_layout
from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError
from moekern.estimation.refit import refitted_bytes
from moekern.merging.tensors import merged_layer, routed_layer
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.groups import aligned, check_plain, merge_recipe, merged_into
from moekern.plan.refit import REFIT, kept_digest
from moekern.plan.router_rows import check_routers, router_rows, routers_computed
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
    merged = {key: layer for key, layer in plan.layers.items() if merged_into(layer)}
    if not merged:
        raise InputError("plan: no expert is merged into another; `prune` drops experts")
    check_plain(checkpoint, layout, plan)
    routers = router_rows(plan)
    check_routers(checkpoint, layout, routers)
    align, recipe = aligned(plan.provenance), merge_recipe(plan, checkpoint.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    remove_others(folder, recipe)
    left = open_refitted(folder).kept if any(folder.glob(f"[!.]*{SUFFIX}")) else {}
    for done, (key, layer) in enumerate(merged.items()):
        progress(done, len(merged))
        if left.get(key) != kept_digest(layer):
            made = merged_layer(checkpoint, layout.layers[key], layer, align=align)
            if key in routers:
                tensors = (tensor for tensor in layout.router_tensors(key) if tensor is not None)
                made |= routed_layer(checkpoint, tensors, layer, routers[key])
            write_layer(folder, key, made, recipe=recipe, kept=layer, model=checkpoint.fingerprint)
    progress(len(merged), len(merged))
    told = {key: {"merged": merged_into(layer)} for key, layer in merged.items()}
    record = {"recipe": recipe, "fingerprint": checkpoint.fingerprint, "layers": told}
    return replace(plan, provenance={**plan.provenance, REFIT: record})


def merged_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Bytes of what `merge_experts` writes at most."""
    layout = find_layout(checkpoint)
    kept = {k: len(layer.keep) for k, layer in plan.layers.items() if layer.groups is not None and k in layout.layers}
    own = sum(checkpoint.tensors[name].nbytes for name in routers_computed(plan, layout))
    return refitted_bytes(checkpoint, layout, kept, all_parts=True) + own
