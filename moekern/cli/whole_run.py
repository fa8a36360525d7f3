"""What `run` does: the stages joined, for one number of experts or several, and how good the result is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moekern.architectures import Layout, find_layout
from moekern.calibration.stable import Stable
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.cli import console, pipeline
from moekern.cli.choosing import Choice, choose, held_for_choice
from moekern.cli.earlier import earlier_statistics
from moekern.cli.plan import check_options, slower_with
from moekern.cli.prune import prune_to
from moekern.cli.quality import quality_of
from moekern.cli.recipes import about_of, check_model_of, check_text_of, written_recipe
from moekern.cli.refitter import Refitter, Work, joined
from moekern.cli.refitting import REFITTED, Place, refit_document
from moekern.criteria import criterion_named
from moekern.data.batches import TokenData
from moekern.data.text import Text
from moekern.errors import InputError
from moekern.estimation.overview import overview
from moekern.evaluation.choice import CHOICE
from moekern.evaluation.held_out import held_back
from moekern.evaluation.losses import Evaluation, losses_document
from moekern.files import (
    check_name,
    check_new,
    check_work,
    is_folder,
    is_plain,
    standing,
    temporary_path,
    work_path,
    working,
)
from moekern.measurement.tiers import backends_of, wanted_tiers
from moekern.model.compute import AUTO, Compute
from moekern.plan.budgets import RELATIVE_TIER
from moekern.plan.document import Mtp, Plan
from moekern.plan.replacement import TIERS as CONSTANTS_OF
from moekern.plan.served import check_folder
from moekern.plan.serving import serve_commands, slower
from moekern.plan.several import Planning, fitted_count, make_plans
from moekern.plan.targets import Target
from moekern.pruning.copying import room_needed
from moekern.pruning.cuts import check_mtp
from moekern.pruning.preflight import check_space
from moekern.pruning.prune import Copy, PruneReport
from moekern.pruning.side_files import check_side_files
from moekern.pruning.work_folder import check_target
from moekern.recipe import Recipe
from moekern.refit.refit import Refitting, check_model, check_room
from moekern.router import kept_count
from moekern.statistics.coverage import THIN, Coverage, coverage
from moekern.statistics.file import Statistics
from moekern.statistics.layer import TIERS


@dataclass(frozen=True)
class Asked:
    """What `run` is to do with the text: the criterion of `planning`, or the best of several; one or more counts."""

    planning: Planning
    tiers: Sequence[str] = ()  # measured beside what the criterion needs
    mtp: Mtp = "prune"
    copy: Copy = "auto"
    forward: bool = True  # logits are compared with the masked original's
    quality: bool = True  # some of the text is held back, and losses are measured on it
    until_stable: float | None = None  # text is measured until its halves keep sets that are so much alike
    refit: Refitter | None = None  # what stays is computed anew
    restart: bool = False  # whatever a stopped run has left, text is measured anew
    form: str | None = None  # in which replaced experts are written
    recipe: Recipe | None = None  # by which the same is done again

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the tiers that are measured."""
        made_of = None if self.planning.replaced is None else CONSTANTS_OF[self.planning.replaced]
        by = RELATIVE_TIER if self.planning.budget.kind == "relative" else None
        criteria = (tier for each in self.planning.criteria for tier in criterion_named(each).tiers)
        return (*self.tiers, *criteria, *filter(None, (made_of, by)))

    @property
    def auto(self) -> bool:
        """Whether the criterion is chosen, among those of the planning, by measurement."""
        return len(self.planning.criteria) > 1


@dataclass(frozen=True)
class Result:
    """One pruned checkpoint."""

    plan: Path
    pruned: PruneReport
    verdict: pipeline.Verdict
    serve: Mapping[str, str]  # target -> command line
    choice: Any = None  # how the criterion was chosen, where it was

    def document(self) -> dict[str, Any]:
        return {
            "plan": str(self.plan),
            "choice": self.choice,
            "pruned": {**asdict(self.pruned), "out": str(self.pruned.out)},
            "verify": self.verdict.document(),
            "serve": dict(self.serve),
        }


@dataclass(frozen=True)
class Run:
    """What `run` made, and where."""

    statistics: Path
    coverage: Mapping[str, Coverage]
    quality: Evaluation | None  # rows: original, then one for each result, by its folder; None where not measured
    results: Sequence[Result]
    refits: Sequence[Refitting] = ()  # one for each result, where it was refitted

    @property
    def good(self) -> bool:
        return all(result.verdict.good for result in self.results)

    def document(self) -> dict[str, Any]:
        found = {
            "statistics": str(self.statistics),
            "coverage": {name: asdict(each) for name, each in self.coverage.items()},
            "quality": None if self.quality is None else losses_document(self.quality),
        }
        several = [result.document() for result in self.results]
        for document, made in zip(several, self.refits, strict=False):
            document["refit"] = refit_document(made)
        return {**found, **several[0]} if len(several) == 1 else {**found, "results": several}


def out_folders(out: Path, keeps: Sequence[float | int]) -> list[Path]:
    """The folder of each count: `out` itself for one (or none: --fit), OUT-0.5, OUT-64, ... for several."""
    check_name(out)
    return [out] if len(keeps) < 2 else [out.with_name(f"{out.name}-{keep:g}") for keep in keeps]


def check_targets(out: Path, keeps: Sequence[float | int]) -> None:
    """Raise InputError unless `run` can make, or go on with, the folder of each count. The model is not looked at."""
    for folder in out_folders(out, keeps):
        if not has_run(folder, out):
            check_target(folder)


def has_run(target: Path, out: Path) -> bool:
    """Whether `run` may have made this target before it was stopped: its statistics are still beside `out`."""
    return bool(target.name) and is_folder(target) and is_plain(work_path(out) / "statistics.safetensors")


def run_stages(folder: Path, text: Text, compute: Compute, out: Path, asked: Asked) -> Run:
    """Calibrate, plan, evaluate, prune, verify. What an earlier run with the same model and data left is used again."""
    wanted = wanted_tiers(asked.wanted, TIERS, "calibrate")
    backends_of(compute.device, compute.backend, wanted)
    checkpoint = open_checkpoint(folder)
    check_model_of(asked.recipe, checkpoint)
    layout = find_layout(checkpoint)
    planning = replace(asked.planning, model=checkpoint)
    if asked.refit is not None:
        planning = asked.refit.narrowed(planning, checkpoint, layout)
        for line in asked.refit.check(checkpoint, layout, compute, planning):
            console.say(line)
        check_mtp(layout, asked.mtp, narrower=asked.refit.narrows(layout))
    check_options(checkpoint, planning)
    check_work(out)
    statistics_path = work_path(out) / "statistics.safetensors"
    targets = out_folders(out, planning.keeps)
    made = [has_run(target, out) for target in targets]  # then it is verified; `prune` tells it from what others made
    keeps = planning.keeps
    if planning.fit is not None:
        keeps = (fitted_count(checkpoint, layout, planning, planning.fit).count,)
    kept = lambda keep: kept_count(keep, planning.router(layout.router))  # noqa: E731
    places = [Place(work_path(out), target.name.removeprefix(out.name)) for target in targets]
    _check_room(checkpoint, layout, [kept(keep) for keep in keeps], targets, made, asked.refit, places)
    stable = _stable(layout, asked, keeps)
    compute = pipeline.told_compute(compute, checkpoint, layout)
    if asked.refit is not None:
        check_model(checkpoint, compute)
    for target, keep in zip(targets, keeps, strict=True) if planning.budget.kind == "uniform" else ():  # else: plans'
        counts = dict.fromkeys(layout.layers, kept(keep))
        _say_of(target, slower(counts, planning.served(layout, checkpoint), planning.targets), len(targets) > 1)
    data = text.read(checkpoint, trust_remote_code=compute.trust_remote_code)
    check_text_of(asked.recipe, data)
    recipe = written_recipe(asked.recipe, checkpoint, data, compute)
    data, held = held_back(data) if asked.quality else (data, replace(data, batches=()))
    data, choosing = held_for_choice(data, planning.domains) if asked.auto else (data, replace(data, batches=()))
    if asked.refit is not None:
        variants = asked.refit.foreseen(layout, max(map(kept, keeps)))
        check_room(checkpoint, data, variants, compute, judged=held)
    measured = data if stable is None else stable.asked(data)  # which a refit does not ask: it takes all of the text
    console.hint(too_few(sum(data.tokens.values()), layout))
    with working(out):
        paths = [_plan_path(out, target) for target in targets]
        _check_plans([*paths, *(place.before for place in places if asked.refit is not None)])
        check = lambda: _check_made(targets, made)  # noqa: E731
        statistics = _statistics(statistics_path, checkpoint, measured, compute, asked, stable, check)
        work = Work(checkpoint, layout, statistics, planning, data, held, compute, asked.restart)
        constants_of = None if planning.replaced is None else statistics_path
        chosen = _chosen(work, keeps, choosing, out, asked, constants_of)
        plans, refits = _made(work, keeps, places, chosen, asked.refit)
        for plan, target in zip(plans, targets, strict=True):
            if planning.budget.kind != "uniform":
                _say_of(target, slower_with(plan, statistics.header, planning), len(targets) > 1)
        for plan, path, done in zip(plans, paths, made, strict=True):
            if not done:
                plan.save(path)
        names = list(map(str, targets))
        if asked.refit is None:
            named = dict(zip(names, plans, strict=True))
            quality = quality_of(checkpoint, held, compute, named, out, asked.restart, constants_of)
        else:
            quality = joined(dict(zip(names, refits, strict=True)))
        reports = [
            prune_to(
                checkpoint, plan, target,
                mtp=asked.mtp, copy=asked.copy, again=done, refitted=None if asked.refit is None else place.folder,
                form=asked.form, statistics=constants_of, about=about_of(quality, str(target), statistics, recipe),
            )
            for plan, target, done, place in zip(plans, targets, made, places, strict=True)
        ]  # fmt: skip
    results = [
        verified(
            folder, plan, path, report, compute,
            forward=asked.forward, mtp=asked.mtp, targets=planning.targets, statistics=constants_of,
        )
        for plan, path, report in zip(plans, paths, reports, strict=True)
    ]  # fmt: skip
    for place in places if asked.refit is not None else ():
        place.clear()
    return Run(statistics_path, coverage(statistics), quality, results, refits)


def _chosen(
    work: Work,
    keeps: Sequence[float | int],
    choosing: TokenData,
    out: Path,
    asked: Asked,
    constants_of: Path | None,
) -> Mapping[float | int, Choice]:
    """The criterion of each --keep where it is chosen by measurement; none elsewhere."""
    if not asked.auto:
        return {}
    return choose(work, keeps, choosing, work_path(out), refitted=asked.refit is not None, constants_of=constants_of)


def _made(
    work: Work,
    keeps: Sequence[float | int],
    places: Sequence[Place],
    chosen: Mapping[float | int, Choice],
    refitter: Refitter | None,
) -> tuple[list[Plan], list[Refitting]]:
    """The plan of each --keep, and its refit where what stays is computed anew."""
    plans, refits = [], []
    for keep, place in zip(keeps, places, strict=True):
        choice = chosen.get(keep)
        planning = work.planning if choice is None else choice.of(work.planning)
        if refitter is None:
            asked = planning if planning.fit is not None else replace(planning, keeps=(keep,))
            plan = next(iter(make_plans(work.statistics, asked).values()))
        else:
            refits.append(refitter.made(replace(work, planning=planning), keep, place))
            plan = refits[-1].plans[REFITTED]
        plans.append(plan if choice is None else choice.marked(plan))
    return plans, refits


def verified(
    folder: Path,
    plan: Plan,
    path: Path,
    report: PruneReport,
    compute: Compute,
    *,
    forward: bool,
    mtp: Mtp | None,
    targets: Sequence[Target],
    statistics: Path | None = None,
) -> Result:
    """What was written, read again. Logits are compared in the type that the comparison chooses, whatever the text was
    measured in."""
    plain = replace(compute, dtype=AUTO)
    verdict = pipeline.verify_both(folder, plan, report.out, plain, forward=forward, mtp=mtp, statistics=statistics)
    serve = serve_commands(report.out, check_folder(report.out, targets), targets)
    return Result(path, report, verdict, serve, plan.provenance.get(CHOICE))


def _statistics(
    path: Path,
    checkpoint: Checkpoint,
    data: TokenData,
    compute: Compute,
    asked: Asked,
    stable: Stable | None,
    check: Callable[[], None],
) -> Statistics:
    """Those that an earlier run has left, or measured now, where `check` does not refuse that."""
    try:
        found = earlier_statistics(path, checkpoint, data, compute, asked.wanted, restart=asked.restart)
    except InputError:
        check()  # which is the matter then
        raise
    if found is not None:
        return found
    check()
    path.unlink(missing_ok=True)  # it is measured anew
    return pipeline.measured(
        checkpoint, data, compute, tiers=asked.wanted, out=path, stable=stable, restart=asked.restart
    )


def _stable(layout: Layout, asked: Asked, keeps: tuple[float | int, ...]) -> Stable | None:
    """When the text is enough for each of the counts; None where all of it is measured."""
    if asked.until_stable is None:
        return None
    planning = asked.planning
    stable = Stable(asked.until_stable, planning.criteria[0], keeps, planning.domains, planning.replaced is not None)
    stable.check(layout.router)
    return stable


def too_few(tokens: int, layout: Layout) -> str | None:
    """The warning that text cannot give each expert THIN tokens, before anything is measured; None where it can."""
    router = layout.router
    each = tokens * router.top_k / router.num_experts
    if each >= THIN:
        return None
    return (
        f"warning: too little text: {tokens:,} tokens are about {each:.0f} for each of {router.num_experts} experts of "
        f"a layer, and fewer than {THIN} say little; give more text, or raise --tokens"
    )


def _check_made(targets: Sequence[Path], made: Sequence[bool]) -> None:
    """Raise InputError for a target that is there, though what it would be made from is not."""
    if any(made):
        check_new(targets[made.index(True)], folder=True)


def _plan_path(out: Path, target: Path) -> Path:
    """The plan of a target in the work folder: plan.json, or plan-0.5.json."""
    return work_path(out) / f"plan{target.name.removeprefix(out.name)}.json"


def _say_of(target: Path, lines: Sequence[str], several: bool) -> None:
    """What is to be said of a plan, with the folder that it is for where there are several."""
    for line in lines:
        console.say(f"{target}: {line}" if several else line)


def _check_plans(paths: Sequence[Path]) -> None:
    """Raise InputError where something else than a plan lies where one is to be written."""
    for path in paths:
        is_plain(temporary_path(path))
        if is_plain(path):
            Plan.load(path)  # else it is not this program's to write over


def _check_room(
    checkpoint: Checkpoint,
    layout: Layout,
    counts: Sequence[int],
    targets: Sequence[Path],
    made: Sequence[bool],
    refitter: Refitter | None,
    places: Sequence[Place],
) -> None:
    """Raise InputError for a target that cannot be made, and where there is no room for all that are not made yet."""
    missing = [each for each, done in zip(zip(targets, counts, places, strict=True), made, strict=True) if not done]
    room, found, layers = 0, overview(checkpoint), dict[Path, int]()
    for target, kept, place in missing:
        check_target(target, checkpoint.folder)
        shape = None if refitter is None else refitter.named
        count, width = (kept, None) if shape is None else (shape.experts, shape.width)
        room += room_needed(checkpoint, standing(target.parent), found.bytes_at(count, width))
        if refitter is not None:
            layers[place.folder] = refitter.room(checkpoint, layout, dict.fromkeys(layout.layers, count), width)
    if missing:
        check_side_files(checkpoint)
        check_space(missing[0][0], room, len(checkpoint.shards) * len(missing), layers)


def show_coverage(found: Mapping[str, Coverage]) -> None:
    """Idle and thin experts, a row a domain."""
    rows = [(name, each.tokens, each.experts, each.idle, each.thin) for name, each in found.items()]
    if len(rows) == 2:
        rows = rows[1:]  # one domain is all there is
    columns = ("domain", "tokens", "experts", "no token", f"fewer than {THIN}")
    console.show("how well the text covers the experts of all layers", columns, rows)
