"""The command `merge-experts`."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.cli import console
from moekern.cli.given import check_statistics, compute_of, folder_of, result, text_of
from moekern.cli.options import (
    AllowNonuniform,
    Chunk,
    Column,
    CopyMode,
    CopyOption,
    Data,
    Device,
    Domains,
    DtypeOption,
    GpuMemory,
    Json,
    Memory,
    Model,
    MtpOption,
    Pack,
    Preset,
    Restart,
    Revision,
    Seed,
    SequenceLength,
    Spill,
    Strict,
    Thinking,
    ThinkingOption,
    Tokens,
    TrustRemoteCode,
)
from moekern.cli.prune import show_pruned
from moekern.cli.verify import show_verdict
from moekern.errors import InputError
from moekern.files import standing

if TYPE_CHECKING:
    from moekern.cli import whole_merge
    from moekern.cli.whole_merge import Make, Merged
    from moekern.plan.document import Plan


class MergeMethod(str, Enum):
    m_smoe = "m-smoe"
    hc_smoe = "hc-smoe"
    ream = "ream"


class RouterRows(str, Enum):
    dominant = "dominant"
    log_sum = "log-sum"
    least_squares = "least-squares"


class Align(str, Enum):
    weights = "weights"
    none = "none"


Out = Annotated[Path, typer.Option(help="The folder to write; it must not exist.")]
Keep = Annotated[str | None, typer.Option(help="Experts kept in each layer: a share (0.5, 50%) or a count.")]
Method = Annotated[
    MergeMethod | None,
    typer.Option(help="Which experts join which: by router logits, by clusters of outputs, or by both and REAP."),
]
StatisticsOption = Annotated[Path | None, typer.Option(help="A statistics file, with --keep and --method.")]
PlanOption = Annotated[Path | None, typer.Option(help="A plan with groups, in the place of statistics or text.")]
AlignOption = Annotated[
    Align, typer.Option(help="Put the channels of a member in the order of the expert that stays, or do not.")
]
RouterOption = Annotated[
    RouterRows,
    typer.Option(
        help="A merged expert's router row: of the one that stays, or fitted to the logarithm of the sum of its "
        "members' exponentiated logits, or to the largest of their logits; what is fitted takes another pass."
    ),
]
BudgetOption = Annotated[
    str, typer.Option(help="uniform, or adaptive: each layer a number of its own, by M-SMoE's rule.")
]


def merge_experts(
    model: Model,
    out: Out,
    keep: Keep = None,
    method: Method = None,
    statistics: StatisticsOption = None,
    data: Data = None,
    plan: PlanOption = None,
    align: AlignOption = Align.weights,
    router: RouterOption = RouterRows.dominant,
    domain: Domains = None,
    budget: BudgetOption = "uniform",
    allow_nonuniform: AllowNonuniform = False,
    preset: Preset = None,
    tokens: Tokens = "1M",
    sequence_length: SequenceLength = None,
    pack: Pack = True,
    chunk: Chunk = None,
    column: Column = None,
    thinking: ThinkingOption = Thinking.row,
    strict: Strict = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    spill: Spill = None,
    restart: Restart = False,
    mtp: MtpOption = None,
    copy: CopyOption = CopyMode.auto,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Merge experts into those that stay: weighted means of their weights; the router keeps the rows of these, or gets
    fitted ones.

    Groups come of a plan, of statistics, or of text that is measured first. What is interrupted goes on in the layer
    that it was in when the same command is run again. Measured on the model that ships, merging is worse than dropping.
    """
    _check_sources(plan, statistics, bool(data or preset), keep, method, domain, budget, router)
    if budget != "uniform" and statistics is None and not allow_nonuniform:
        what = "layers keep different numbers of experts, which no engine loads"
        raise InputError(f"--budget {budget}: {what}; add --allow-nonuniform, or leave it out", kind="option")

    from moekern.cli import whole_merge

    whole_merge.check_out(out)
    if plan is not None:
        make = _as_read(_read(plan, align))
    else:
        grouping = _grouping(keep, method, align, router, domain, budget, allow_nonuniform)
        if statistics is not None:
            make = _as_read(_measured(grouping, statistics))
        else:
            text = text_of(
                data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column,
                thinking=thinking, strict=strict, pack=pack, chunk=chunk, seed=seed,
            )  # fmt: skip
            compute = compute_of(
                device=device, dtype=dtype, memory=memory, gpu_memory=gpu_memory, spill=spill or standing(out.parent),
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            make = whole_merge.by_text(text, compute, grouping, restart=restart)
    folder = folder_of(model, revision)
    done = whole_merge.merge_stages(folder, make, out, mtp=mtp.value if mtp else None, copy=copy.value)
    result(done.document(), lambda: show_merged(done), good=done.good)


def _check_sources(
    plan: Path | None,
    statistics: Path | None,
    text: bool,
    keep: str | None,
    method: MergeMethod | None,
    domain: list[str] | None,
    budget: str,
    router: RouterRows,
) -> None:
    """Raise InputError for flags that do not go together."""
    if (plan is not None) + (statistics is not None) + text != 1:
        raise InputError("--plan, --statistics, --data: give one of the three", kind="option")
    if plan is None and (keep is None or method is None):
        raise InputError("--keep, --method: statistics and text need both", kind="option")
    for flag, value in (("--keep", keep), ("--method", method), ("--domain", domain)):
        if plan is not None and value:
            raise InputError(f"{flag}: the plan has its experts and groups already; leave one of the two out")
    if budget not in (("uniform",) if plan is not None else ("uniform", "adaptive")):
        raise InputError(f"--budget {budget}: expected uniform, or without --plan adaptive (M-SMoE's rule)")
    if router is not RouterRows.dominant and not text:
        what = "rows are fitted to text, which neither a plan nor statistics hold"
        raise InputError(f"--router {router.value}: {what}; give --data, with --keep and --method", kind="option")


def _as_read(plan: Plan) -> Make:
    """A plan that is known before the model is looked at."""
    return lambda checkpoint, side: plan


def _measured(grouping: whole_merge.Grouping, statistics: Path) -> Plan:
    """The groups of a statistics file."""
    check_statistics(statistics)

    from moekern.statistics.file import Statistics

    return grouping.plan(Statistics.load(statistics))


def _read(path: Path, align: Align) -> Plan:
    """A plan, whose channels are not matched where that is asked for."""
    from moekern.plan.document import Plan
    from moekern.plan.groups import MERGE

    given = Plan.load(path)
    if align is Align.none:
        told = given.provenance.get(MERGE)
        told = {**(told if isinstance(told, dict) else {}), "align": align.value}
        given = replace(given, provenance={**given.provenance, MERGE: told})
    return given


def _grouping(
    keep: str | None,
    method: MergeMethod | None,
    align: Align,
    router: RouterRows,
    domain: list[str] | None,
    budget: str,
    allow_nonuniform: bool,
) -> whole_merge.Grouping:
    from moekern.cli.whole_merge import Grouping
    from moekern.plan.budgets import Budget
    from moekern.router import parse_keep

    assert keep is not None
    assert method is not None
    share, domains = parse_keep(keep), tuple(domain) if domain else None
    own = Budget(budget, allow_nonuniform=allow_nonuniform)
    return Grouping(method.value, share, align.value, domains, own, router.value)


def show_merged(done: Merged) -> None:
    """What was merged, what was written, and whether it is right."""
    from moekern.plan.groups import merged_into

    rows = []
    for key, layer in done.plan.layers.items():
        sizes = [len(group) for group in layer.groups or ()]
        into = sum(size > 1 for size in sizes)
        rows.append((key, len(layer.keep), into, merged_into(layer), max(sizes, default=1)))
    columns = ("layer", "stay", "of them merged", "experts merged into them", "largest group")
    console.show("merged", columns, rows)
    show_pruned(done.pruned)
    show_verdict(done.verdict)
    console.say(f"plan: {done.path}")
