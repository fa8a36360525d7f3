"""The command `run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli import ranks
from moekern.cli.console import hint, say
from moekern.cli.given import compute_of, result, say_unused, text_of
from moekern.cli.options import (
    RESERVE,
    AllowNonuniform,
    Bits,
    BudgetOption,
    Chunk,
    Column,
    Computed,
    ComputedDtype,
    Context,
    CopyMode,
    CopyOption,
    Data,
    Device,
    Domains,
    DtypeOption,
    FitOption,
    GpuMemory,
    Json,
    Keeps,
    Memory,
    Model,
    MtpOption,
    Normalise,
    Pack,
    Preset,
    ProtectSuper,
    ReEstimate,
    RefineOption,
    RefitOption,
    Reserve,
    Restart,
    Revision,
    Seed,
    SequenceLength,
    Sequences,
    ShapeOption,
    Spill,
    Strict,
    Targets,
    Thinking,
    ThinkingOption,
    Tiers,
    Tokens,
    TrustRemoteCode,
    UntilStable,
    UnusedBatchSize,
    check_criteria,
)
from moekern.cli.plan import budget_of, fit_of
from moekern.cli.prune import show_pruned
from moekern.cli.recipes import RecipeOption, recipe_of, revision_of
from moekern.cli.replacing import FormOption, Replace, check_given
from moekern.cli.verify import show_verdict
from moekern.criteria.table import AUTO, CANDIDATES, DEFAULT
from moekern.errors import InputError
from moekern.files import standing
from moekern.router import parse_keep

if TYPE_CHECKING:
    from moekern.cli.refitter import Refitter
    from moekern.cli.whole_run import Run
    from moekern.estimation.footprint import Fit
    from moekern.plan.budgets import Budget
    from moekern.plan.several import Planning


def check_criterion_or_auto(given: Any) -> Any:
    """The same where a choice by measurement is a criterion too."""
    return given if given == AUTO else check_criteria(given)


Out = Annotated[
    Path,
    typer.Option(help="The folder to write; it must not exist. Several --keep write OUT-0.5, OUT-64, ..."),
]
Forward = Annotated[
    bool, typer.Option(help="Prove the result by comparing logits with the masked original (two more passes).")
]
AutoCriterionOption = Annotated[
    str,
    typer.Option(
        "--criterion", help="How experts are ranked; `moekern criteria` lists them. auto: measured on held-back text.",
        callback=check_criterion_or_auto,
    ),
]  # fmt: skip
Candidates = Annotated[
    list[str] | None,
    typer.Option(
        "--candidate", help="With --criterion auto: a criterion to try. Repeat it. Default: a few that do well.",
        callback=check_criteria,
    ),
]  # fmt: skip
Quality = Annotated[
    bool,
    typer.Option(help="Hold a tenth of the text back and measure loss and top-1 on it (one more pass)."),
]


def run(
    ctx: typer.Context,
    model: Model,
    out: Out,
    recipe: RecipeOption = None,
    data: Data = None,
    keep: Keeps = None,
    fit: FitOption = None,
    bits: Bits = None,
    context: Context = 0,
    sequences: Sequences = 1,
    reserve: Reserve = RESERVE,
    criterion: AutoCriterionOption = DEFAULT,
    candidate: Candidates = None,
    preset: Preset = None,
    tokens: Tokens = "1M",
    sequence_length: SequenceLength = None,
    pack: Pack = True,
    chunk: Chunk = None,
    batch_size: UnusedBatchSize = None,
    column: Column = None,
    thinking: ThinkingOption = Thinking.row,
    strict: Strict = False,
    seed: Seed = 0,
    domain: Domains = None,
    tier: Tiers = None,
    until_stable: UntilStable = None,
    budget: BudgetOption = "uniform",
    normalise: Normalise = "none",
    allow_nonuniform: AllowNonuniform = False,
    replace: Replace = None,
    form: FormOption = None,
    target: Targets = None,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    spill: Spill = None,
    protect_super: ProtectSuper = False,
    mtp: MtpOption = None,
    copy: CopyOption = CopyMode.auto,
    forward: Forward = True,
    quality: Quality = True,
    refit: RefitOption = False,
    refine: RefineOption = False,
    shape: ShapeOption = None,
    re_estimate: ReEstimate = False,
    computed_dtype: ComputedDtype = Computed.source,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Calibrate, plan, prune and verify; what was killed goes on. Statistics and plan stay in OUT.moekern/."""
    written = recipe_of(ctx, recipe)
    keeps = _keeps(keep or (), fit)  # before torch is imported, or anything downloaded
    _check_refit(refit, refine, shape, re_estimate, quality, computed_dtype.value)
    check_given(replace, form, refit=refit)
    criteria = candidates_of(criterion, candidate, until_stable)

    from moekern.cli import whole_run

    budgets = budget_of(budget, None, normalise, "usage", 1, allow_nonuniform)
    fitting = fit_of(fit, bits, context, sequences, reserve)
    whole_run.check_targets(out, keeps)
    asked = whole_run.Asked(
        _planning(criteria, keeps, domain, seed, budgets, protect_super, target, fitting, replace),
        tuple(tier or ()), mtp.value if mtp else "keep" if replace else "prune", copy.value, forward=forward,
        quality=quality, until_stable=until_stable, restart=restart, form=form, recipe=written,
        refit=_refitter(refine, shape, computed_dtype.value, re_estimate) if refit else None,
    )  # fmt: skip
    say_unused(batch_size)
    text = text_of(data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column,
                   thinking=thinking, strict=strict, pack=pack, chunk=chunk, seed=seed)  # fmt: skip
    compute = compute_of(device=device, dtype=dtype, memory=memory, gpu_memory=gpu_memory,
                         spill=spill or standing(out.parent), trust_remote_code=trust_remote_code)  # fmt: skip
    compute = ranks.together(compute)
    folder = ranks.folder_of(model, revision_of(ctx, recipe, revision), compute.team)
    _tell(whole_run.run_stages(folder, text, compute, out, asked), quality)


def _keeps(texts: Sequence[str], fit: str | None) -> tuple[float | int, ...]:
    """The counts, none with --fit. Raises InputError for both or neither, and for two that name the same folder."""
    keeps = tuple(parse_keep(text) for text in texts)
    if (fit is None) == (not keeps):
        raise InputError("--keep, --fit: give one of the two")
    if len({f"{keep:g}" for keep in keeps}) < len(keeps):
        raise InputError(f"--keep {', '.join(texts)}: the same is given twice")
    return keeps


def candidates_of(
    criterion: str, candidates: Sequence[str] | None, until_stable: float | None = None
) -> tuple[str, ...]:
    """The criterion, or those of which the best is to be taken. Raises InputError."""
    if criterion != AUTO:
        if candidates:
            raise InputError(f"--candidate {candidates[0]}: goes with --criterion {AUTO}")
        return (criterion,)
    found = tuple(candidates or CANDIDATES)
    if until_stable is not None:
        raise InputError(f"--until-stable: is by one criterion; name one instead of {AUTO}")
    if len(set(found)) < max(2, len(found)):
        raise InputError(f"--candidate {', '.join(found)}: name two or more, each once")
    return found


def _planning(
    criteria: tuple[str, ...],
    keeps: tuple[float | int, ...],
    domains: Sequence[str] | None,
    seed: int,
    budget: Budget,
    protect_super: bool,
    targets: Sequence[str] | None,
    fit: Fit | None,
    replaced: str | None,
) -> Planning:
    """How experts are chosen. Raises InputError for a criterion or an engine that is none."""
    from moekern.criteria import criterion_named
    from moekern.plan.guards import Guards
    from moekern.plan.several import Planning
    from moekern.plan.targets import parse_target

    for criterion in criteria:
        criterion_named(criterion)
    return Planning(
        criteria=criteria, keeps=keeps, domains=tuple(domains) if domains else None, seed=seed, budget=budget,
        guards=Guards(protect_super=protect_super), targets=tuple(parse_target(text) for text in targets or ()),
        fit=fit, replaced=replaced,
    )  # fmt: skip


def _refitter(refine: bool, shape: str | None, computed: str, re_estimate: bool) -> Refitter:
    from moekern.cli.refitter import Refitter

    return Refitter(refine, shape, computed, re_estimate)


def _check_refit(refit: bool, refine: bool, shape: str | None, re_estimate: bool, quality: bool, computed: str) -> None:
    """Raise InputError for what goes with --refit alone."""
    for flag, given in (
        ("--refine", refine),
        (f"--shape {shape}", shape is not None),
        ("--reestimate", re_estimate),
        (f"--computed-dtype {computed}", computed != "source"),
    ):
        if given and not refit:
            raise InputError(f"{flag}: goes with --refit")
    if refit and not quality:
        raise InputError("--no-quality: a refit is judged on text that is held back; leave it out")


def _tell(done: Run, quality: bool) -> None:
    _say_remarks(done)
    result(done.document(), lambda: show_run(done, quality), good=done.good)


def _say_remarks(done: Run) -> None:
    """What has to be known of the text and the plans, for programs too."""
    from moekern.cli.plan import fit_line
    from moekern.plan.agreement import doubt
    from moekern.plan.document import Plan
    from moekern.plan.provenance import remarks
    from moekern.statistics.coverage import too_thin
    from moekern.statistics.file import Statistics

    statistics = Statistics.load(done.statistics)
    for made in done.results:
        plan = Plan.load(made.plan)
        hint(fit_line(plan))
        for line in (*remarks(plan), *filter(None, [doubt(statistics, plan)])):
            say(line if len(done.results) == 1 else f"{made.pruned.out}: {line}")
    hint(too_thin(done.coverage))


def show_run(done: Run, quality: bool) -> None:
    """How well the text covers the experts; of each result what was written, and whether its bytes are right; how good
    it is; how it is served; the artefacts' places."""
    from moekern.cli.quality import quality_lines
    from moekern.cli.refitting import show_refit
    from moekern.cli.whole_run import show_coverage

    show_coverage(done.coverage)
    for made in done.refits:
        show_refit(made)
    for each in done.results:
        show_pruned(each.pruned)
        show_verdict(each.verdict)
    for line in quality_lines(done.quality, quality):
        say(line)
    for each in done.results:
        for name, command in each.serve.items():
            say(f"serve with {name}: {command}")
    plans = ", ".join(str(each.plan) for each in done.results)
    say(f"statistics: {done.statistics}; plan{'s' if len(done.results) > 1 else ''}: {plans}")
