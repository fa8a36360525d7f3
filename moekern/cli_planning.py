"""The planning commands: criteria, score, plan, compare, check, convert."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern import console, tables, tables_planning
from moekern.cli_options import CriterionOption, Domains, Json, MtpMode, ProtectSuper, Seed, result
from moekern.errors import InputError

if TYPE_CHECKING:
    from moekern.estimation.footprint import Fit
    from moekern.plan.budgets import Budget
    from moekern.plan.guards import Guards

commands = typer.Typer()


class Tool(str, Enum):
    moekern = "moekern"
    llm_compressor = "llm-compressor"
    compressed_tensors = "compressed-tensors"


StatisticsFile = Annotated[
    Path, typer.Argument(help="A statistics file; or a checkpoint folder, for criteria that need its weights alone.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="transformers, vllm, sglang or llama.cpp, as vllm:tp=2,ep=4; repeatable."),
]
Words = list[str] | None


@commands.command(epilog="moekern criteria")
def criteria(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/criteria.md.")] = False,
    as_json: Json = False,
) -> None:
    """List the criteria that score, plan and run know."""
    from moekern.criteria.table import described

    if markdown:
        print(tables.markdown(described()), end="")
        return
    result(as_json, described(), lambda: tables.criteria(described()))


@commands.command(epilog="moekern score s.safetensors --criterion hope")
def score(
    statistics: StatisticsFile,
    criterion: CriterionOption = "reap",
    domain: Domains = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show every expert's score; higher is kept."""
    from moekern import stages

    scores = stages.scores(stages.statistics_of(statistics, [criterion], as_json), criterion, domain, seed)
    result(as_json, {"criterion": criterion, "layers": scores}, lambda: tables.scores(criterion, scores))


@commands.command(epilog="moekern plan s.safetensors --criterion reap --keep 0.5 --target vllm:tp=2 --out plan.json")
def plan(
    statistics: StatisticsFile,
    out: Annotated[
        Path, typer.Option(help="The plan to write; for several a folder, or a name with {} in it: plan-{}.json.")
    ],
    keep: Annotated[
        Words,
        typer.Option(help="Experts kept in each layer: a share (0.5, 50%) or a count (64). Repeat it for several."),
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="Instead of --keep: the most experts whose weights and KV cache fit, as 24GiB.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The checkpoint; --fit reads sizes from its headers.")] = None,
    bits: Annotated[float | None, typer.Option(help="With --fit: bits a weight, as 4.5. Default: as stored.")] = None,
    context: Annotated[int, typer.Option(help="With --fit: tokens of a sequence in the KV cache.")] = 0,
    sequences: Annotated[int, typer.Option(help="With --fit: sequences in the KV cache.")] = 1,
    criterion: Annotated[
        list[str], typer.Option(help="How experts are ranked; `moekern criteria` lists them. Repeat it for several.")
    ] = ["reap"],  # noqa: B006  typer copies it
    domain: Domains = None,
    budget: Annotated[
        str, typer.Option(help="uniform; global, adaptive or waterfill let layers keep different numbers.")
    ] = "uniform",
    floor: Annotated[
        str | None, typer.Option(help="The least each layer keeps, a share or a count. Default: what the router needs.")
    ] = None,
    normalise: Annotated[
        str, typer.Option(help="With --budget global, each layer's scores: none, sum, max, mean or zscore.")
    ] = "none",
    adaptive_by: Annotated[
        str, typer.Option(help="With --budget adaptive: usage (M-SMoE's rule) or entropy (of the router).")
    ] = "usage",
    multiple_of: Annotated[int, typer.Option(help="Counts are multiples of this; never above the budget.")] = 1,
    allow_nonuniform: Annotated[
        bool, typer.Option("--allow-nonuniform", help="Accept different counts, which no engine loads.")
    ] = False,
    target: Targets = None,
    mtp: Annotated[
        MtpMode | None, typer.Option(help="What prune does with MTP layers: prune, drop or keep. Default: prune.")
    ] = None,
    protect_super: ProtectSuper = False,
    keep_always: Annotated[Words, typer.Option(help="LAYER:EXPERT[,EXPERT] to keep in any case; repeatable.")] = None,
    drop_first: Annotated[Words, typer.Option(help="LAYER:EXPERT[,EXPERT] to drop before others; repeatable.")] = None,
    guard: Annotated[
        Words, typer.Option(help="DOMAIN[,DOMAIN][=N]: keep the N experts it uses most above others; repeatable.")
    ] = None,
    suppress: Annotated[
        Words, typer.Option(help="DOMAIN[,DOMAIN][=N]: drop the N experts it uses most above others; repeatable.")
    ] = None,
    domain_floor: Annotated[
        Words, typer.Option(help="[DOMAIN=]SHARE of its gate x norm that each domain keeps in every layer; repeatable.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose the experts that stay and write them down; several plans at once from one statistics file."""
    from moekern import stages_planning as stages
    from moekern.plan.several import Planning, make_plans
    from moekern.plan.targets import parse_target
    from moekern.router import parse_keep
    from moekern.stages import statistics_of

    options = Planning(
        criteria=tuple(criterion),
        keeps=tuple(parse_keep(text) for text in keep or ()),
        domains=tuple(domain) if domain else None,
        seed=seed,
        budget=_budget(budget, floor, normalise, adaptive_by, multiple_of, allow_nonuniform),
        guards=_guards(protect_super, keep_always, drop_first, guard, suppress, domain_floor),
        targets=tuple(parse_target(text) for text in target or ()),
        mtp=mtp and mtp.value,
        model=_folder(model),
        fit=_fit(fit, bits, context, sequences),
    )
    stages.check_destination(out, len(options.criteria) * max(1, len(options.keeps)))
    plans = make_plans(statistics_of(statistics, criterion, as_json), options)
    paths = stages.destinations(out, list(plans))
    stages.save_plans(plans, paths)
    documents = {n: {"out": str(paths[n]), "digest": made.digest, **made.provenance} for n, made in plans.items()}
    document = next(iter(documents.values())) if len(documents) == 1 else {"plans": documents}
    result(as_json, document, lambda: tables_planning.plans(plans, paths))


@commands.command(epilog="moekern compare reap.json hope.json --statistics s.safetensors")
def compare(
    plans: Annotated[list[Path], typer.Argument(help="Plans of one model.")],
    statistics: Annotated[
        Path | None, typer.Option(help="Also tell what each plan drops of what was measured.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How far plans keep the same experts, and how much of the gates and outputs each of them drops."""
    from moekern.plan.compare import compare as compared
    from moekern.plan.document import Plan
    from moekern.statistics.file import Statistics

    named = {str(path): Plan.load(path) for path in plans}
    if len(named) < len(plans):
        raise InputError("compare: the same file is named twice")
    found = compared(named, None if statistics is None else Statistics.load(statistics))
    result(as_json, dataclasses.asdict(found), lambda: tables_planning.comparison(found))


@commands.command(epilog="moekern check MODEL-pruned --target vllm:tp=4,ep=4")
def check(
    model: Annotated[str, typer.Argument(help="A checkpoint folder or a hub id, pruned or not.")],
    target: Targets = None,
    as_json: Json = False,
) -> None:
    """Which engines load and run a checkpoint with its expert counts; exit code 1 if one named by --target does not."""
    from moekern.checkpoint.hub import model_folder
    from moekern.plan.served import check_folder
    from moekern.plan.targets import parse_target

    targets = [parse_target(text) for text in target or ()]
    report = check_folder(model_folder(model), targets)
    result(as_json, report.document(), lambda: tables_planning.report(report))
    if targets and not report.good:
        raise typer.Exit(1)


@commands.command(epilog="moekern convert plan.json --to llm-compressor --model MODEL --out report.json")
def convert(
    source: Annotated[Path, typer.Argument(help="A plan, an llm-compressor report or a retained_experts map.")],
    to: Annotated[Tool, typer.Option(help="Whose words to write.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    model: Annotated[str | None, typer.Option(help="The checkpoint, which gives modules their names.")] = None,
    allow_nonuniform: Annotated[
        bool, typer.Option("--allow-nonuniform", help="Accept different counts, which no engine loads.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a plan into other tools' words, or theirs into a plan."""
    from moekern import files
    from moekern.plan.interchange import convert as converted

    if out.exists():
        raise InputError(f"--out {out}: exists already")
    text = converted(source, to.value, _folder(model), allow_nonuniform=allow_nonuniform)
    files.write_bytes(out, text.encode())
    document = {"source": str(source), "to": to.value, "out": str(out)}
    result(as_json, document, lambda: console.say(f"{out}: {source} for {to.value}"))


def _folder(model: str | None) -> Path | None:
    from moekern.checkpoint.hub import model_folder

    return None if model is None else model_folder(model)


def _budget(kind: str, floor: str | None, normalise: str, by: str, multiple_of: int, nonuniform: bool) -> Budget:
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


def _fit(limit: str | None, bits: float | None, context: int, sequences: int) -> Fit | None:
    from moekern.estimation.footprint import Fit

    if limit is None:
        if bits is not None or context or sequences != 1:
            raise InputError("--bits, --context, --sequences: go with --fit")
        return None
    return Fit(console.parsed_size("--fit", limit), bits, context, sequences)
