"""The command `plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli import console
from moekern.cli.console import say, show
from moekern.cli.given import check_statistics, optional_headers, parsed_reserve, parsed_size, result, statistics_of
from moekern.cli.options import (
    RESERVE,
    AllowNonuniform,
    Bits,
    BudgetOption,
    Context,
    CriteriaOption,
    Domains,
    FitOption,
    Json,
    Keeps,
    MtpMode,
    Normalise,
    ProtectSuper,
    Reserve,
    Revision,
    Seed,
    Sequences,
    StatisticsFile,
    Targets,
    Words,
)
from moekern.cli.replacing import Replace, check_replaced
from moekern.criteria.table import DEFAULT
from moekern.errors import InputError
from moekern.files import check_document, check_new, check_place, is_written, sized

if TYPE_CHECKING:
    from moekern.checkpoint.folder import Checkpoint
    from moekern.estimation.footprint import Fit
    from moekern.plan.budgets import Budget
    from moekern.plan.document import Plan
    from moekern.plan.guards import Guards
    from moekern.plan.several import Planning
    from moekern.statistics.file import Statistics

Out = Annotated[
    Path, typer.Option(help="The plan to write; for several a folder, or a name with {} in it: plan-{}.json.")
]
PlannedMtp = Annotated[
    MtpMode | None, typer.Option(help="What prune does with MTP layers: prune, drop or keep. Default: prune.")
]
DomainFloor = Annotated[
    Words, typer.Option(help="[DOMAIN=]SHARE of its gate x norm that each domain keeps in every layer; repeatable.")
]


def plan(
    statistics: StatisticsFile,
    out: Out,
    keep: Keeps = None,
    fit: FitOption = None,
    model: Annotated[str | None, typer.Option(help="A folder or hub id; --fit reads sizes from its headers.")] = None,
    bits: Bits = None,
    context: Context = 0,
    sequences: Sequences = 1,
    reserve: Reserve = RESERVE,
    criterion: CriteriaOption = [DEFAULT],  # noqa: B006  typer copies it
    domain: Domains = None,
    budget: BudgetOption = "uniform",
    floor: Annotated[
        str | None, typer.Option(help="The least each layer keeps, a share or a count. Default: what the router needs.")
    ] = None,
    normalise: Normalise = "none",
    adaptive_by: Annotated[
        str, typer.Option(help="With --budget adaptive: usage (M-SMoE's rule) or entropy (of the router).")
    ] = "usage",
    multiple_of: Annotated[int, typer.Option(help="Counts are multiples of this; never above the budget.")] = 1,
    allow_nonuniform: AllowNonuniform = False,
    replace: Replace = None,
    target: Targets = None,
    mtp: PlannedMtp = None,
    protect_super: ProtectSuper = False,
    keep_always: Annotated[Words, typer.Option(help="LAYER:EXPERT[,EXPERT] to keep in any case; repeatable.")] = None,
    drop_first: Annotated[Words, typer.Option(help="LAYER:EXPERT[,EXPERT] to drop before others; repeatable.")] = None,
    guard: Annotated[
        Words, typer.Option(help="DOMAIN[,DOMAIN][=N]: keep the N experts it uses most above others; repeatable.")
    ] = None,
    suppress: Annotated[
        Words, typer.Option(help="DOMAIN[,DOMAIN][=N]: drop the N experts it uses most above others; repeatable.")
    ] = None,
    domain_floor: DomainFloor = None,
    seed: Seed = 0,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Choose the experts that stay and write them down; several plans at once from one statistics file."""
    from moekern.router import parse_keep

    check_destination(out, len(criterion) * max(1, len(keep or ())))
    keeps = tuple(parse_keep(text) for text in keep or ())
    check_statistics(statistics)

    from moekern.checkpoint.folder import open_checkpoint
    from moekern.plan.fits_model import TWIN
    from moekern.plan.several import Planning, make_plans
    from moekern.plan.targets import parse_target

    checkpoint = optional_headers(model, revision)
    weighed = open_checkpoint(statistics) if statistics.is_dir() else None
    options = Planning(
        criteria=tuple(criterion),
        keeps=keeps,
        domains=tuple(domain) if domain else None,
        seed=seed,
        budget=budget_of(budget, floor, normalise, adaptive_by, multiple_of, allow_nonuniform),
        guards=_guards(protect_super, keep_always, drop_first, guard, suppress, domain_floor),
        targets=tuple(parse_target(text) for text in target or ()),
        mtp=mtp and mtp.value,
        model=checkpoint or weighed,
        fit=fit_of(fit, bits, context, sequences, reserve),
        replaced=replace,
    )
    if weighed is not None:
        check_options(weighed, options)
    measured = statistics_of(statistics, criterion)
    header, plans = measured.header, make_plans(measured, options)
    paths = destinations(out, list(plans))
    save_plans(plans, paths)
    if checkpoint is not None and checkpoint.fingerprint != header["fingerprint"]:
        say(f"--model {checkpoint.name}: the statistics were {TWIN}")
    for name, made in plans.items():
        for line in _told_of(made, measured, options):
            say(line if len(plans) == 1 else f"{paths[name]}: {line}")
    documents = {n: {"out": str(paths[n]), "digest": made.digest, **made.provenance} for n, made in plans.items()}
    document = next(iter(documents.values())) if len(documents) == 1 else {"plans": documents}
    result(document, lambda: show_plans(plans, paths))


def _told_of(made: Plan, measured: Statistics, options: Planning) -> list[str]:
    """What has to be known of a plan."""
    from moekern.plan.agreement import doubt
    from moekern.plan.provenance import remarks

    told = (*remarks(made), doubt(measured, made), *slower_with(made, measured.header, options))
    return [line for line in told if line is not None]


def slower_with(plan: Plan, header: Mapping[str, Any] | None, options: Planning) -> list[str]:
    """What the targets do slower, or not at all, with a plan's counts: by the model of `options`, else by the header of
    statistics."""
    from moekern.architectures import find_layout
    from moekern.checkpoint.folder import open_checkpoint
    from moekern.plan.serving import slower
    from moekern.plan.targets import Served
    from moekern.statistics.header import router_of

    counts = {key: len(layer.keep) for key, layer in plan.layers.items()}
    if not options.targets:
        return []
    if options.model is not None:
        checkpoint = open_checkpoint(options.model) if isinstance(options.model, Path) else options.model
        served = options.served(find_layout(checkpoint), checkpoint)
    else:
        assert header is not None
        served = Served(header["family"], header["score"], router_of(header))
    return slower(counts, dataclasses.replace(served, replaced=plan.replace is not None), options.targets)


def budget_of(kind: str, floor: str | None, normalise: str, by: str, multiple_of: int, nonuniform: bool) -> Budget:
    from moekern.plan.budgets import Budget
    from moekern.router import parse_keep

    least = None if floor is None else parse_keep(floor, "--floor")
    return Budget(kind, least, normalise, by, multiple_of, nonuniform)


def _guards(
    protect_super: bool, keep_always: Words, drop_first: Words, guard: Words, suppress: Words, floors: Words
) -> Guards:
    from moekern.plan import guards

    return guards.Guards(
        protect_super=protect_super,
        keep_always=guards.parse_experts("--keep-always", keep_always or ()),
        drop_first=guards.parse_experts("--drop-first", drop_first or ()),
        guard=guards.parse_behaviours("--guard", guard or ()),
        suppress=guards.parse_behaviours("--suppress", suppress or ()),
        domain_floor=guards.parse_floors(floors or ()),
    )


def fit_of(limit: str | None, bits: float | None, context: int, sequences: int, reserve: str) -> Fit | None:
    """What is to fit, where --fit is given. Raises InputError."""
    from moekern.estimation.footprint import Fit

    if limit is None:
        if bits is not None or context or sequences != 1 or reserve != RESERVE:
            raise InputError("--bits, --context, --sequences, --reserve: go with --fit")
        return None
    nbytes = parsed_size("--fit", limit)
    return Fit(nbytes, bits, context, sequences, parsed_reserve(reserve, nbytes))


def check_options(checkpoint: Checkpoint, options: Planning) -> None:
    """Raise InputError for what headers alone tell to be wrong, before all weights of a checkpoint are read."""
    from moekern.architectures import find_layout
    from moekern.plan.several import check_planning, fitted_count
    from moekern.plan.targets import check_counts
    from moekern.router import kept_count

    check_planning(options)
    layout = find_layout(checkpoint)
    if options.fit is not None:
        fitted_count(checkpoint, layout, options, options.fit)
    served = options.served(layout, checkpoint)
    if options.replaced is not None:
        check_replaced(checkpoint, layout)
    plain = options.budget.kind == "uniform" and options.budget.multiple_of == 1
    for keep in options.keeps if plain else ():
        count = kept_count(keep, options.router(layout.router))
        check_counts(f"--keep {keep}", dict.fromkeys(layout.layers, count), served, options.targets)


def check_destination(out: Path, plans: int) -> None:
    """Raise InputError when `out` cannot take so many plans: known before anything is measured."""
    if "{}" not in out.name and plans > 1 and out.suffix == ".json":
        raise InputError(f"--out {out}: {plans} plans need a folder, or a name with {{}} in it such as plan-{{}}.json")
    folder = out.parent if "{}" in out.name else out
    if folder.is_dir():
        check_place(folder / "plan.json")
    elif plans > 1:  # a folder is made for them
        check_new(folder, folder=True)
    else:
        check_document(out)


def destinations(out: Path, names: Sequence[str]) -> dict[str, Path]:
    """Name -> the file to write. One plan goes to `out`; several, or one where `out` is a folder, to NAME.json in it,
    or, where its name has {} in it, to the files with NAME in that place."""
    if "{}" in out.name:
        return {name: out.with_name(out.name.replace("{}", name)) for name in names}
    if len(names) > 1 or out.is_dir():
        return {name: out / f"{name}.json" for name in names}
    return {names[0]: out}


def save_plans(plans: Mapping[str, Plan], paths: Mapping[str, Path]) -> None:
    """Write every plan, in folders that are made where they are missing. Files that hold the same plan already, of a
    run that was stopped, stay; for others InputError is raised before any is written."""
    for name, path in paths.items():
        if not is_written(path, plans[name].to_json().encode()):
            check_new(path)
    for name, plan in plans.items():
        if not plan.save(paths[name], new=True):
            say(f"{paths[name]}: held this plan already")


def show_plans(made: Mapping[str, Plan], paths: Mapping[str, Path]) -> None:
    """One plan: its kept experts per layer. Several: a line each."""
    if len(made) > 1:
        several = [(paths[name], p.provenance["criterion"], _kept(p), p.digest[:12]) for name, p in made.items()]
        show("plans", ("file", "criterion", "kept", "digest"), several)
        return
    (name, plan), rows = next(iter(made.items())), []
    for key, layer in plan.layers.items():
        keep = " ".join(map(str, layer.keep))
        room = max(24, console.columns() - 20)
        rows.append((key, len(layer.keep), keep if len(keep) <= room else keep[: room - 3] + "..."))
    provenance = plan.provenance
    title = (
        f"{paths[name]}: {with_tiers(provenance['criterion'])}, {_kept(plan)} of {provenance['num_experts']} experts"
    )
    show(title, ("layer", "kept", "experts"), rows)
    console.hint(fit_line(plan))
    if plan.replace is not None:
        say(f"dropped experts become constants ({plan.replace.constants}); the router stays whole, and vLLM loads this")
    elif isinstance(provenance["kept"], dict):
        say(
            "layers keep different numbers: moekern writes, verifies and evaluates this; no engine loads it, but with "
            "--replace vLLM does"
        )


def with_tiers(criterion: str) -> str:
    """A criterion, and which tiers of statistics it reads, where its name tells that."""
    from moekern.criteria import criterion_named

    try:
        found = criterion_named(criterion)
    except InputError:  # a function of a user's file
        return criterion
    names = found.tiers if found.family == "weight" else ("routed", *found.tiers)
    return f"{criterion} (tier{'s' if len(names) > 1 else ''} {', '.join(names)})"


def fit_line(plan: Plan) -> str | None:
    """What the memory of --fit goes to; None of a plan without it."""
    fit = plan.provenance.get("fit")
    if not fit:
        return None
    cache = f", KV cache {sized(fit['cache'])}" if fit["context"] else "; no KV cache is counted without --context"
    kept = fit.get("reserve", 0)
    left = f", of which {sized(kept)} are left to activations and to what an engine may not use (--reserve)"
    return f"weights {sized(fit['weights'])}{cache}; limit {sized(fit['limit'])}{left if kept else ''}"


def _kept(plan: Plan) -> str:
    counts = [len(layer.keep) for layer in plan.layers.values()]
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}, {sum(counts)} in all"
