"""Plans in the words of other tools.

llm-compressor: the JSON that REAPPruningModifier of 0.14 writes to `report_path`, {MoE block: [kept experts]}, with
names such as "model.layers.0.mlp". Later versions write scores under "saliency" and "count" there instead, which name
no kept experts. Taken from descriptions of the tool's output; a block's name is what the router and the experts share.

compressed-tensors: `retained_experts` of MagnitudeExpertPruner (0.20), {router weight: [kept experts]}, with names such
as "model.layers.0.mlp.gate.weight", read from its code. There it is an argument, not a file; the JSON is the mapping
itself. Its pruner looks up every router of the checkpoint in it, those of MTP layers too, and takes one count for all;
llm-compressor works on the model that transformers builds, which has no MTP layers.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moekern.architectures import Layout, MoeLayer, find_layout
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.errors import InputError
from moekern.layer_keys import natural
from moekern.plan.document import NONUNIFORM, LayerPlan, Plan, check_ids, check_layers, parsed, plan_of, plan_text
from moekern.plan.fits_model import check_plan
from moekern.plan.refit import refit_of
from moekern.version import __version__

TOOLS = ("llm-compressor", "compressed-tensors")
Kept = Callable[[Checkpoint, Layout, Plan], Mapping[str, tuple[int, ...]]]  # what a plan comes to, MTP layers and all
LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|block|h|decoder_layer)\.(0|[1-9][0-9]{0,5})(?:\.|$)")


def exported(plan: Plan, layout: Layout, tool: str) -> str:
    """The plan as the JSON of `tool`; the names are those of the checkpoint. Raises InputError without a router."""
    layers = {**layout.layers, **layout.mtp}
    names = {key: (_block if tool == TOOLS[0] else _router)(layers[key]) for key in plan.layers}
    ordered = sorted(plan.layers, key=natural)
    return json.dumps({names[key]: list(plan.layers[key].keep) for key in ordered}, indent=2) + "\n"


def read_plan(text: str, source: str, layout: Layout | None = None, *, allow_nonuniform: bool = False) -> Plan:
    """A plan of moekern's own ("format") or from either other tool's JSON; there `layout` gives the names, without it
    layers are known by their number.

    Raises InputError, naming `source`, as Plan.from_json does, and for what is no list of kept experts for each layer.
    """
    document = parsed(text, source)
    if isinstance(document, dict) and "format" in document:
        return plan_of(document, source)
    return _imported(_by_layer(document, source), source, layout, allow_nonuniform=allow_nonuniform)


def _imported(document: Mapping[str, Any], source: str, layout: Layout | None, *, allow_nonuniform: bool) -> Plan:
    known = {} if layout is None else _names({**layout.layers, **layout.mtp})
    layers: dict[str, LayerPlan] = {}
    for name, keep in document.items():
        where = f"{source}: {name:.60}"
        key = known.get(name) if layout is not None else _number(name)
        if key is None:
            hint = "the model has no such MoE block or router" if layout is not None else "no layer number in it"
            raise InputError(f"{where}: {hint}; name the model that it was made for with --model")
        if key in layers:
            raise InputError(f"{where}: layer {key} comes twice")
        if not isinstance(keep, list) or not keep:
            raise InputError(f"{where}: expected a list of the experts it keeps")
        check_ids(keep, where)
        layers[key] = LayerPlan(tuple(sorted(keep)))
    tool = TOOLS[1] if any(name.endswith(".weight") for name in document) else TOOLS[0]
    provenance: dict[str, Any] = {"moekern": __version__, "converted_from": tool}
    if allow_nonuniform and len({len(layer.keep) for layer in layers.values()}) > 1:
        provenance[NONUNIFORM] = True
    return Plan({key: layers[key] for key in sorted(layers, key=natural)}, provenance)


def _by_layer(document: Any, source: str) -> dict[str, Any]:
    if isinstance(document, dict) and isinstance(document.get("retained_experts"), dict):
        document = document["retained_experts"]
    if not isinstance(document, dict) or not document:
        raise InputError(f"{source}: expected an object of MoE blocks or routers, each with the experts it keeps")
    check_layers(document, source)
    if {"saliency", "count"} & document.keys():
        raise InputError(
            f"{source}: holds scores, not kept experts; prune with llm-compressor 0.14's report, or calibrate"
        )
    return document


def _names(layers: Mapping[str, MoeLayer]) -> dict[str, str]:
    """Every name that a layer may go by -> its key; a router with or without the name of its parameter."""
    found: dict[str, str] = {}
    for key, layer in layers.items():
        router = _router(layer)
        found |= dict.fromkeys((_block(layer), router, router.rpartition(".")[0]), key)
    return found


def _block(layer: MoeLayer) -> str:
    """The module that holds router and experts."""
    return _common([tensor.template or tensor.name for tensor in layer.of_role("router", "expert")])


def _router(layer: MoeLayer) -> str:
    """The router's weight."""
    for tensor in layer.of_role("router"):
        if tensor.name.endswith("weight"):
            return tensor.name
    raise InputError(f"{layer.prefix}: its router has no weight of its own to name")


def _common(names: Iterable[str]) -> str:
    """The dotted beginning that all names share."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def _number(name: str) -> str | None:
    """The layer's number; None for names without one and for MTP blocks, which only the model can tell."""
    found = LAYER.search(name)
    return found[1] if found and "mtp" not in name else None


def convert(
    path: Path, tool: str, model: Path | Checkpoint | None, kept: Kept, *, allow_nonuniform: bool = False
) -> str:
    """The text of a plan file in another tool's words, or in moekern's; `kept` is pruning's. Raises InputError."""
    checkpoint = open_checkpoint(model) if isinstance(model, Path) else model
    layout = None if checkpoint is None else find_layout(checkpoint)
    plan = read_plan(plan_text(path), str(path), layout, allow_nonuniform=allow_nonuniform)
    if checkpoint is None or layout is None:
        if tool != "moekern":
            raise InputError(f"--to {tool}: its names are those of the model's modules: add --model MODEL")
        return plan.to_json()
    check_plan(plan, layout, checkpoint, str(path))
    beyond = {
        "merges experts": plan.merges,
        "says which channels of experts stay": plan.width is not None,
        "is of layers that were refitted": refit_of(plan) is not None,
    }
    if tool != "moekern" and (what := next((what for what, there in beyond.items() if there), None)):
        raise InputError(f"{path}: {what}, for which {tool} has no words; prune with moekern")
    if tool == TOOLS[1] and layout.mtp:
        plan = _with_mtp(plan, layout, kept(checkpoint, layout, plan), str(path))
    if tool != "moekern":
        return exported(plan, layout, tool)
    return Plan(plan.layers, {"fingerprint": checkpoint.fingerprint, **plan.provenance}).to_json()


def _with_mtp(plan: Plan, layout: Layout, kept: Mapping[str, tuple[int, ...]], source: str) -> Plan:
    """The plan with the MTP layers that pruning cuts. Raises InputError for what compressed-tensors cannot do."""
    counts = {len(kept[key]) for key in layout.layers}
    for key, layer in layout.mtp.items():
        stay = len(kept[key]) if key in kept else layer.num_experts
        if {stay} != counts or (key not in kept and plan.provenance.get("mtp") == "drop"):
            does = "drops" if plan.provenance.get("mtp") == "drop" else f"keeps {stay} experts of"
            raise InputError(
                f"{source}: {does} MTP layer {key}; compressed-tensors keeps that layer, with as many experts as the "
                "others: convert a plan made with --mtp prune, or prune with moekern"
            )
    whole = {key: tuple(range(layer.num_experts)) for key, layer in layout.mtp.items()}
    named = {key: plan.layers.get(key, LayerPlan(kept.get(key, whole[key]))) for key in layout.mtp}
    return Plan({**plan.layers, **named}, plan.provenance)
