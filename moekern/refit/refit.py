"""The stage that refits: variants of a model made and judged in one pass over its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern.architectures import Layout, find_layout
from moekern.architectures.widths import narrow_problem, width_problem
from moekern.calibration.sharing import facts_of
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import TokenData
from moekern.data.text import check_data
from moekern.errors import InputError, check_type
from moekern.evaluation.losses import ORIGINAL, Evaluation, means, row_document
from moekern.measurement.tiers import served
from moekern.model.compute import Compute
from moekern.model.journal import Resume, opened
from moekern.model.layerwise import open_layerwise
from moekern.model.position import digest, text_key
from moekern.model.precision import settled
from moekern.model.state_folder import removed
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.groups import check_plain
from moekern.plan.refit import REFIT
from moekern.plan.router_rows import router_rows
from moekern.pruning.refitted import remove_others, write_layer
from moekern.refit.choice import check_choice
from moekern.refit.live import check_layers
from moekern.refit.refine import check_alone
from moekern.refit.stored import Stored, check_formats, format_of
from moekern.refit.streams import Streams
from moekern.refit.variants import FITTED, Split, Variant
from moekern.version import versions

STAGE = "refitting"
OPS = ("gated_energy", "expert_gram", "scatter_residual")
STATE = "moekern-refit-"  # and a digest: the folder of a run that is not done


@dataclass(frozen=True)
class Refitting:
    """What came of the variants: their plans, which name the channels and in `provenance.refit` what was computed and
    how well it fits, and the losses of the original and of each on text that decided nothing (none: empty)."""

    plans: Mapping[str, Plan]
    losses: Evaluation


def refit(
    source: str | Path | Checkpoint,
    data: TokenData,
    variants: Sequence[Variant],
    compute: Compute = Compute(),
    *,
    judged: TokenData | None = None,
    resume: Resume | None = None,
    until: str | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> Refitting:
    """Make variants of a model, and hold them against it, in one pass over its weights with a stream of hidden states
    for each beside the original's.

    Of each domain a tenth of the sequences is held back to choose between candidates. All are held against the original
    on other text, `judged` (None: another tenth), which decides nothing. What a variant computes is written to its
    folder, a file for each layer, for `prune(..., refitted=)`. With `resume` the same call goes on where it was
    stopped. `until` names the last layer that is wanted: nothing behind it is made, and nothing is judged. Several
    processes (`compute.team`) share the text, with the same bits. Raises InputError for plans that do not fit the
    model, models that cannot be refitted, and text that is too little.
    """
    check_type("compute", compute, Compute)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    check_family(layout, checkpoint)
    check_data(data, checkpoint)
    for variant in variants:
        _check(variant, layout, checkpoint)
    if until is not None and until not in layout.layers:
        raise InputError(f"refit: until: the model has no layer {until!r} with experts")
    team = compute.team
    for choice in (variant.choice for variant in variants if variant.choice is not None):
        check_choice(choice, data)
    if any(variant.refine is not None for variant in variants):
        check_alone(team)
    compute = settled(compute, checkpoint, layout)
    team.together(refit, checkpoint.folder, data, variants, compute, judged=judged, until=until)
    team.check_alike(facts_of(checkpoint, compute))
    split = Split.of(data, judged)
    _check_text(split, variants)
    key = key_of(checkpoint, split, data, variants, compute)
    if resume is not None:
        resume = replace(resume, folder=resume.folder / f"{STATE}{digest(key)[:16]}")
    recipes = {variant.name: recipe_of(key, variant) for variant in variants}

    def write(variant: Variant, name: str, kept: LayerPlan, tensors: Stored) -> None:
        if variant.folder is None or not team.first:
            return
        variant.folder.mkdir(parents=True, exist_ok=True)
        write_layer(
            variant.folder, name, tensors, recipe=recipes[variant.name], kept=kept, model=checkpoint.fingerprint
        )

    with (
        opened(resume, key, (STAGE,), team) as journal,
        open_layerwise(checkpoint, layout, compute, team) as layerwise,
    ):
        check_layers(layerwise)
        for variant in variants:
            if variant.fits:
                check_formats(checkpoint, layout, layerwise.loader, variant.plan.layers, variant.all_parts)
        streams = Streams(layerwise, split, variants, write, progress, until, compute.backend)
        streams.expect()
        for variant in variants if team.first else ():
            if variant.folder is not None:
                remove_others(variant.folder, recipes[variant.name])
        streams.run(None if journal is None else journal.stage(STAGE))
    losses = _losses(streams, split, [ORIGINAL, *(variant.name for variant in variants)])
    if journal is not None and team.first:
        removed(journal.folder)
    plans = {
        variant.name: _plan(variant, layers, records, recipes[variant.name], key, data, losses.get(variant.name, {}))
        for variant, layers, records in zip(variants, streams.plans, streams.records, strict=True)
    }
    return Refitting(plans, losses)


def check_model(source: str | Path | Checkpoint, compute: Compute) -> None:
    """Raise InputError for a model whose experts cannot be refitted; see `check_layers`. All processes of a team look,
    since they share memory; of the weights what lies outside of layers is read."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout, team = find_layout(checkpoint), compute.team
    team.together(check_model, checkpoint.folder, compute)
    with open_layerwise(checkpoint, layout, compute, team) as layerwise:
        check_layers(layerwise)


def check_room(
    source: str | Path | Checkpoint,
    data: TokenData,
    variants: Sequence[Variant],
    compute: Compute,
    *,
    judged: TokenData | None = None,
) -> None:
    """Raise InputError for text that memory and disk have no room for. `refit` asks it first of all: this is for those
    who have much to do before. Otherwise as `check_model`."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout, team = find_layout(checkpoint), compute.team
    team.together(check_room, checkpoint.folder, data, variants, compute, judged=judged)
    with open_layerwise(checkpoint, layout, compute, team) as layerwise:
        check_layers(layerwise)
        Streams(layerwise, Split.of(data, judged), variants, lambda *written: None).expect()


def check_family(layout: Layout, checkpoint: Checkpoint) -> None:
    """Raise InputError for a family whose experts are not refitted."""
    if reason := layout.family.no_refit:
        raise InputError(f"{checkpoint.folder}: {layout.family.name}: {reason}; prune it without a refit")


def _check(variant: Variant, layout: Layout, checkpoint: Checkpoint) -> None:
    check_plan(variant.plan, layout, checkpoint)
    if variant.fits:
        format_of(variant.computed, checkpoint, layout)
    if variant.name == ORIGINAL:
        raise InputError(f"refit: a variant is named {ORIGINAL!r}, as the unpruned model is; give it another name")
    if variant.width is not None and variant.plan.width is not None:
        raise InputError(f"{variant.name}: the plan says which channels stay; do not ask for {variant.width} of them")
    if variant.plan.merges and (variant.width is not None or variant.choice is not None):
        what = "experts that stay are neither narrowed nor chosen anew"
        raise InputError(f"{variant.name}: the plan merges experts: {what}; take a plan that drops them")
    if variant.fits and router_rows(variant.plan):
        what = "a refit writes no rows of routers, and the plan has such of merged experts (provenance.merge.router)"
        raise InputError(f"{variant.name}: {what}; take a plan of --router dominant")
    check_plain(checkpoint, layout, variant.plan)
    if variant.width is not None:
        _check_width(variant, variant.width, layout, checkpoint)


def _check_width(variant: Variant, width: int, layout: Layout, checkpoint: Checkpoint) -> None:
    if problem := narrow_problem(checkpoint, layout) or width_problem(layout, width):
        raise InputError(f"{variant.name}: {width} channels are to stay: {problem}")
    if layout.width is not None and width > layout.width:
        raise InputError(f"{variant.name}: {width} channels are to stay, and experts have {layout.width}")
    further = [key for key in variant.plan.layers if key not in layout.layers]
    if further:
        raise InputError(f"{variant.name}: no text runs through layer {further[0]}, which the plan names; leave it out")


def _check_text(split: Split, variants: Sequence[Variant]) -> None:
    if any(variant.fits for variant in variants) and not split.tokens(FITTED):
        raise InputError("refit: there is no text to fit to; give some (--data)", kind="data")


def key_of(
    checkpoint: Checkpoint, split: Split, data: TokenData, variants: Sequence[Variant], compute: Compute
) -> dict[str, Any]:
    """All that decides the bits, in words for people."""
    whole = replace(data, batches=split.batches)
    return {
        "model": checkpoint.fingerprint,
        "config.json": checkpoint.config_sha256,
        "text": {**text_key(whole), "uses": list(split.uses)},
        "variants": [described(variant) for variant in variants],
        "--dtype": compute.dtype_name,
        "--device": compute.place.type,
        "backend": backends(compute),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def backends(compute: Compute) -> dict[str, str]:
    """Op -> the backend that serves it. Raises InputError where none does."""
    return served(dict.fromkeys(OPS, compute.place.type), compute.backend)


def recipe_of(key: Mapping[str, Any], variant: Variant) -> str:
    """sha256 of all that decides what is computed for one variant, whatever others are made beside it."""
    return digest({**key, "variants": described(variant)})


def described(variant: Variant) -> dict[str, Any]:
    """All that makes a variant what it is."""
    return {
        "plan": variant.plan.digest,
        "width": variant.width,
        "computed": variant.computed,
        "ridge": None if variant.ridge is None else asdict(variant.ridge),
        "refine": None if variant.refine is None else asdict(variant.refine),
        **({} if variant.choice is None else {"choice": asdict(variant.choice)}),
    }


def _plan(
    variant: Variant,
    layers: Mapping[str, LayerPlan],
    records: Mapping[str, Any],
    recipe: str,
    key: Mapping[str, Any],
    data: TokenData,
    losses: Mapping[str, Any],
) -> Plan:
    """The plan of what a variant became."""
    before = {name: value for name, value in variant.plan.provenance.items() if name != "ties" or not variant.choice}
    made = {key: replace(plan, keep=layers[key].keep, channels=layers[key].channels,
                         scores=None if variant.choice else plan.scores)
            for key, plan in variant.plan.layers.items() if key in layers}  # fmt: skip
    rest = {key: plan for key, plan in variant.plan.layers.items() if key not in layers}
    if not records:
        return Plan({**made, **rest}, before)
    said = {
        "recipe": recipe,
        "layers": dict(records),
        **described(variant),
        "backend": key["backend"],
        "data": data.recipe,
        "judged": row_document(losses),
    }
    return Plan({**made, **rest}, {**before, REFIT: said})


def _losses(streams: Streams, split: Split, names: Sequence[str]) -> Evaluation:
    """Means over held-back tokens, by stream and domain."""
    whole: dict[tuple[int, int], Tensor] = {}
    for each in streams.team.gather(streams.sums):
        whole |= each
    found = ((names[n], split.batches[place].domain, whole[place, n]) for place, n in sorted(whole))
    return means(names, found)
