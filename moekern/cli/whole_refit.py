"""What `refit` does: the stages joined."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.architectures import Layout, find_layout
from moekern.checkpoint.folder import PLAN_FILE, Checkpoint, open_checkpoint, read_data
from moekern.checkpoint.strict_json import read_json
from moekern.cli import console, pipeline
from moekern.cli.prune import prune_to
from moekern.cli.recipes import about_of
from moekern.cli.refitter import Refitter, check_narrow
from moekern.cli.refitting import DROPPED, REFITTED, Place, refit_document, refitted
from moekern.cli.whole_run import Result, verified
from moekern.data.batches import TokenData
from moekern.data.text import Text
from moekern.errors import InputError
from moekern.estimation.overview import overview
from moekern.evaluation.held_out import held_back
from moekern.files import check_work, is_folder, is_plain, scratch, standing, work_path, working
from moekern.model.compute import Compute
from moekern.model.position import differences
from moekern.plan.document import Mtp, Plan, planned_mtp
from moekern.plan.fits_model import check_plan
from moekern.plan.refit import REFIT, refit_of
from moekern.plan.served import served_as
from moekern.plan.serving import slower
from moekern.plan.targets import Target, check_counts
from moekern.pruning.copying import room_needed
from moekern.pruning.cuts import check_mtp
from moekern.pruning.preflight import check_space
from moekern.pruning.prune import Copy
from moekern.pruning.refitted import SUFFIX, open_refitted
from moekern.pruning.work_folder import check_target
from moekern.refit.choice import Choice
from moekern.refit.refit import Refitting, backends, check_model, described, key_of, recipe_of, refit
from moekern.refit.variants import Split, Variant

PLAN = "plan.json"  # in the work folder: what the refit has made of the plan


@dataclass(frozen=True)
class Asked:
    """How experts are refitted, and the result written."""

    width: int | None = None
    refine: bool = False
    computed: str = "source"
    mtp: Mtp | None = None
    copy: Copy = "auto"
    forward: bool = True
    restart: bool = False
    re_estimate: bool = False
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class Found:
    """What `refit` made, and where."""

    result: Result
    refit: Refitting

    @property
    def good(self) -> bool:
        return self.result.verdict.good

    def document(self) -> dict[str, Any]:
        return {**self.result.document(), "refit": refit_document(self.refit)}


def check_out(out: Path) -> None:
    """Raise InputError unless `refit` can make this target, or go on with one that it had made when it was stopped.
    What a run that was done has left of its layers is removed."""
    check_work(out)
    place = Place(work_path(out))
    if is_folder(out) and is_plain(place.document):
        return
    if is_folder(out) and is_plain(place.side / PLAN):  # which is there when layers are done
        place.clear()
    check_target(out)


def refit_stages(folder: Path, plan: Plan, text: Text, compute: Compute, out: Path, asked: Asked) -> Found:
    """Refit, prune, verify. What an earlier run with the same model, plan and data left is used again."""
    check_work(out)
    refitter, checkpoint, compute, data, judged = _looked_at(folder, plan, text, compute, asked, out)
    with working(out) as side:
        place, path = Place(side), side / PLAN
        variants = Variant(DROPPED, plan), refitter.variant(plan, asked.width, place.folder)
        made = refitted(checkpoint, data, judged, variants, compute, place, restart=asked.restart)
        whole = made.plans[REFITTED]
        whole.save(path)
        report = prune_to(
            checkpoint, whole, out, mtp=asked.mtp, copy=asked.copy, again=is_folder(out), refitted=place.folder,
            about=about_of(made.losses, REFITTED),
        )  # fmt: skip
        result = verified(
            folder, whole, path, report, compute, forward=asked.forward, mtp=asked.mtp, targets=asked.targets
        )
        place.clear()
    return Found(result, made)


def verify_stages(
    folder: Path, plan: Plan, text: Text, compute: Compute, pruned: Path, asked: Asked, *, full: bool
) -> pipeline.Verdict:
    """Hold what an earlier refit of this plan left in `pruned` against the source, and layers that it computed, all of
    them with `full`, against the same computed again. Raises InputError where it was not made in this way."""
    whole = _plan_of(pruned)
    refitter, checkpoint, compute, data, judged = _looked_at(folder, plan, text, compute, asked, None)
    record = refit_of(whole)
    if record is None:
        raise InputError(f"--verify {pruned}: none of its layers was refitted; `verify` compares it with the source")
    last = list(record.layers)[-1]
    with scratch(compute.spill or tempfile.gettempdir(), "verify") as place:
        variant = refitter.variant(plan, asked.width, place / "refit")
        key = key_of(checkpoint, Split.of(data, judged), data, [variant], compute)
        if recipe_of(key, variant) != record.recipe:
            raise InputError(f"--verify {pruned}: {_other_recipe(whole, plan, variant, data, compute)}")

        def again(key: str) -> Mapping[str, Any]:
            """The tensors of a layer: with `full` one pass makes those of all."""
            assert variant.folder is not None
            if not (variant.folder / f"{key}{SUFFIX}").is_file():
                until = last if full else key
                with console.progress("refitting again") as step:
                    refit(checkpoint, data, [variant], compute, judged=judged, until=until, progress=step)
            found = open_refitted(variant.folder).tensors
            return {
                name: read_data(each.path, each.entry, each.entry.start, each.entry.nbytes)
                for name, each in found.items()
                if each.layer == key
            }

        return pipeline.verify_both(folder, whole, pruned, compute, forward=False, recompute=again, full=full)


def _looked_at(
    folder: Path, plan: Plan, text: Text, compute: Compute, asked: Asked, out: Path | None
) -> tuple[Refitter, Checkpoint, Compute, TokenData, TokenData]:
    """What is refitted, once everything that is asked for is known to be possible; the text that it is fitted to, and
    that it is judged by."""
    if not text.data:
        raise InputError("refit: it is fitted to text: give --data", kind="option")
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    console.hint(check_plan(plan, layout, checkpoint))
    refitter = Refitter(asked.refine, None, asked.computed, asked.re_estimate)
    if asked.re_estimate:
        Choice.of(plan)  # refuses plans that do not say how experts were chosen
    refitter.check(checkpoint, layout, compute, width=asked.width or plan.width)
    for line in _check_served(plan, asked, checkpoint, layout):
        console.say(line)
    _check_room(plan, asked, refitter, checkpoint, layout, out, compute)
    compute = pipeline.told_compute(compute, checkpoint, layout)
    check_model(checkpoint, compute)
    data, judged = held_back(text.read(checkpoint, trust_remote_code=compute.trust_remote_code))
    return refitter, checkpoint, compute, data, judged


def _check_served(plan: Plan, asked: Asked, checkpoint: Checkpoint, layout: Layout) -> list[str]:
    """Raise InputError for a width that experts cannot have, and for a width or counts that a target does not run.
    Returns a line for all that they cost there."""
    served, lines = served_as(layout, checkpoint.config), list[str]()
    if asked.width is not None and plan.width is not None:
        raise InputError(f"--width {asked.width}: the plan says which channels stay, {plan.width} of each expert")
    width, what = asked.width or plan.width, f"--width {asked.width}" if asked.width else "plan"
    mtp = planned_mtp(plan) if asked.mtp is None else asked.mtp
    check_mtp(layout, mtp, narrower=width not in (None, layout.width))
    if width is not None:
        lines = check_narrow(what, width, checkpoint, layout, asked.targets)
        served = served.narrowed(width)
    counts = {key: len(layer.keep) for key, layer in plan.layers.items() if key in layout.layers}
    check_counts("plan", counts, served, asked.targets)
    return [*lines, *slower(counts, served, asked.targets)]


def _check_room(
    plan: Plan, asked: Asked, refitter: Refitter, checkpoint: Checkpoint, layout: Layout, out: Path | None,
    compute: Compute,
) -> None:  # fmt: skip
    """Raise InputError where the disk has no room for what is computed, and for the target, if one is written (None:
    layers are only compared) and is not there yet."""
    kept = {key: len(layer.keep) for key, layer in plan.layers.items() if key in layout.layers}
    width = asked.width or plan.width
    layers = refitter.room(checkpoint, layout, kept, width, merges=plan.merges)
    if out is None:
        place = Path(compute.spill or tempfile.gettempdir())
        check_space(place / "refit", 0, len(kept), {place / "refit": layers})
    elif not is_folder(out):
        mean = layout.num_experts * sum(kept.values()) / sum(layout.layers[key].num_experts for key in kept)
        room = room_needed(checkpoint, standing(out.parent), overview(checkpoint).bytes_at(mean, width))
        check_space(out, room, len(checkpoint.shards) + len(kept), {Place(work_path(out)).folder: layers})


def _plan_of(pruned: Path) -> Plan:
    """The plan that a pruned folder says it was made by."""
    found = read_json(pruned / PLAN_FILE).get("plan")
    return Plan.from_json(json.dumps(found), f"{pruned / PLAN_FILE}: plan")


def _other_recipe(whole: Plan, plan: Plan, variant: Variant, data: TokenData, compute: Compute) -> str:
    """In what this refit differs from the one that made a plan, as far as that says it."""
    told, asked = whole.provenance[REFIT], json.loads(json.dumps(described(variant)))
    if told.get("plan") != plan.digest:
        where = "`run` keeps it in its work folder, in a name that ends in before-refit.json"
        return f"was refitted from another plan; give the one that its refit was given ({where})"
    names = (*asked, "choice")
    other = differences({name: told.get(name) for name in names}, {name: asked.get(name) for name in names})
    if other:
        return f"was refitted with another {other}; give the options that its refit was given"
    if told.get("backend") != backends(compute):
        return "was refitted by the kernels of another backend; name it (--backend)"
    if told.get("data") != data.recipe:
        return "was fitted to other text; give the text that its refit was given"
    what = "the same text and options, and another model, type (--dtype), device, number of threads or version"
    return f"was refitted with {what} of torch or transformers; compute as its refit did"
