"""The command `merge-experts`."""

from __future__ import annotations

from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli import console
from moekern.cli.given import check_statistics, folder_of, result
from moekern.cli.options import (
    AllowNonuniform,
    BudgetOption,
    CopyMode,
    CopyOption,
    Domains,
    Json,
    Model,
    MtpOption,
    Revision,
)
from moekern.cli.prune import prune_to, show_pruned
from moekern.cli.verify import show_verdict
from moekern.errors import InputError
from moekern.files import check_work, is_folder, standing, work_path, working

if TYPE_CHECKING:
    from moekern.cli.pipeline import Verdict
    from moekern.plan.document import Plan
    from moekern.pruning.prune import PruneReport

PLAN, LAYERS = "plan.json", "refit"  # in the work folder: the plan that was carried out, and merged layers until then


class MergeMethod(str, Enum):
    m_smoe = "m-smoe"
    hc_smoe = "hc-smoe"
    ream = "ream"


class Align(str, Enum):
    weights = "weights"
    none = "none"


def merge_experts(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    statistics: Annotated[Path | None, typer.Option(help="A statistics file: with --keep and --method.")] = None,
    keep: Annotated[str | None, typer.Option(help="Experts kept in each layer: a share (0.5, 50%) or a count.")] = None,
    method: Annotated[
        MergeMethod | None,
        typer.Option(help="Which experts join which: by router logits, by clusters of outputs, or both by salience."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan with groups, in the place of statistics.")] = None,
    align: Annotated[
        Align, typer.Option(help="Put the channels of a member in the order of the expert that stays, or do not.")
    ] = Align.weights,
    domain: Domains = None,
    budget: BudgetOption = "uniform",
    allow_nonuniform: AllowNonuniform = False,
    mtp: MtpOption = None,
    copy: CopyOption = CopyMode.auto,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Merge experts into those that stay: weighted means of their weights; the router keeps the rows of these.

    What is interrupted goes on in the layer that it was in when the same command is run again. Merging is measured to
    be worse than dropping in most cases: docs/merging.md.
    """
    from moekern.pruning.work_folder import check_target

    if (plan is None) == (statistics is None):
        raise InputError("--plan, --statistics: give one of the two")
    if statistics is not None and (keep is None or method is None):
        raise InputError("--statistics: needs --keep and --method", kind="option")
    check_work(out)
    again = is_folder(out) and is_folder(work_path(out) / LAYERS)  # it was stopped while it verified
    if not again:
        check_target(out)
    given = _planned(plan, statistics, keep, method, align, domain, budget, allow_nonuniform)
    whole, report, verdict = merged(
        folder_of(model, revision), given, out, mtp=mtp.value if mtp else None, copy=copy.value, again=again
    )
    document = {
        "plan": str(work_path(out) / PLAN), "merged": _counts(whole),
        "pruned": {**asdict(report), "out": str(report.out)}, "verify": verdict.document(),
    }  # fmt: skip
    result(document, lambda: show_merged(whole, report, verdict, out))
    if not verdict.good:
        raise typer.Exit(1)


def merged(
    folder: Path, plan: Plan, out: Path, *, mtp: Any, copy: Any, again: bool
) -> tuple[Plan, PruneReport, Verdict]:
    """Merge, prune, verify. What an earlier run with the same model and plan left is used again."""
    from moekern.architectures import find_layout
    from moekern.checkpoint.folder import open_checkpoint
    from moekern.cli import pipeline
    from moekern.estimation.overview import overview
    from moekern.merging.merge import merge_experts, merged_bytes
    from moekern.plan.fits_model import check_plan
    from moekern.pruning.copying import room_needed
    from moekern.pruning.preflight import check_space
    from moekern.pruning.refitted import SUFFIX

    checkpoint = open_checkpoint(folder)
    with working(out) as side:
        layers = side / LAYERS
        if not again:
            layout = find_layout(checkpoint)
            check_plan(plan, layout, checkpoint)
            kept = [len(plan.layers[key].keep) / layer.num_experts for key, layer in layout.layers.items()]
            mean = layout.num_experts * sum(kept) / len(kept)
            room = room_needed(checkpoint, standing(out.parent), overview(checkpoint).bytes_at(mean))
            check_space(out, room, len(checkpoint.shards) + len(kept), {layers: merged_bytes(checkpoint, plan)})
        with console.progress("merging") as step:
            whole = merge_experts(checkpoint, plan, layers, step)
        whole.save(side / PLAN)
        report = prune_to(checkpoint, whole, out, mtp=mtp, copy=copy, again=again, refitted=layers)
        verdict = pipeline.verify_both(folder, whole, out, forward=False, mtp=mtp)
        for path in layers.glob(f"*{SUFFIX}"):
            path.unlink()
        layers.rmdir()
    return whole, report, verdict


def _planned(
    path: Path | None,
    statistics: Path | None,
    keep: str | None,
    method: MergeMethod | None,
    align: Align,
    domain: list[str] | None,
    budget: str,
    allow_nonuniform: bool,
) -> Plan:
    """The plan that is named, or made of statistics. Raises InputError for options that do not go with it."""
    from moekern.plan.budgets import Budget
    from moekern.plan.document import Plan
    from moekern.plan.groups import MERGE
    from moekern.router import parse_keep

    if path is not None:
        for flag, value in (("--keep", keep), ("--method", method), ("--domain", domain)):
            if value:
                raise InputError(f"{flag}: goes with --statistics; the plan has its experts and groups")
        if budget != "uniform":
            raise InputError(f"--budget {budget}: goes with --statistics; the plan has its experts and groups")
        given = Plan.load(path)
        told = given.provenance.get(MERGE)
        if align is Align.none:
            told = {**(told if isinstance(told, dict) else {}), "align": align.value}
            given = replace(given, provenance={**given.provenance, MERGE: told})
        return given
    if budget not in ("uniform", "adaptive"):
        raise InputError(f"--budget {budget}: expected uniform, or adaptive (M-SMoE's rule)")
    assert statistics is not None
    assert keep is not None
    assert method is not None
    share = parse_keep(keep)
    check_statistics(statistics)

    from moekern.merging.groups import merging_plan
    from moekern.statistics.file import Statistics

    return merging_plan(
        Statistics.load(statistics), method.value, share, align=align.value,
        budget=Budget(budget, allow_nonuniform=allow_nonuniform), domains=domain or None,
    )  # fmt: skip


def _counts(plan: Plan) -> dict[str, int]:
    from moekern.plan.groups import merged_into

    return {key: merged_into(layer.groups) for key, layer in plan.layers.items()}


def show_merged(plan: Plan, report: PruneReport, verdict: Verdict, out: Path) -> None:
    """What was merged, what was written, and whether it is right."""
    rows = []
    for key, layer in plan.layers.items():
        largest = max((len(group) for group in layer.groups or ()), default=1)
        into = sum(len(group) > 1 for group in layer.groups or ())
        rows.append((key, len(layer.keep), into, _counts(plan)[key], largest))
    columns = ("layer", "stay", "of them merged", "experts merged into them", "largest group")
    console.show("merged", columns, rows)
    show_pruned(report)
    show_verdict(verdict)
    console.say(f"plan: {work_path(out) / PLAN}")
