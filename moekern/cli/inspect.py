"""The command `inspect`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.cli.console import say, show
from moekern.cli.enough import enough
from moekern.cli.given import headers_of, is_typed, result
from moekern.cli.options import CriterionOption, Json, Revision, check_model
from moekern.criteria.table import DEFAULT
from moekern.errors import InputError
from moekern.files import sized

if TYPE_CHECKING:
    from moekern.checkpoint.folder import Checkpoint
    from moekern.estimation.overview import Overview
    from moekern.plan.document import Plan

RUN_BY = {"transformers": "transformers", "its own code": "its own code, with --trust-remote-code"}


def check_model_or_statistics(name: str) -> str:
    """Raise InputError for what is neither a file, a folder nor a hub id."""
    return name if os.path.isfile(name) else check_model(name)


def inspect(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder; a hub id, of which headers are read; or a statistics file: was the text enough?",
            callback=check_model_or_statistics,
        ),
    ],
    criterion: CriterionOption = DEFAULT,
    keep: Annotated[
        str, typer.Option(help="Of a statistics file: the share or count at which halves of the text are compared.")
    ] = "0.5",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show layout, experts, bytes and what can be pruned, from the headers alone."""
    statistics_file = os.path.isfile(model)
    for name in ("revision",) if statistics_file else ("criterion", "keep"):
        if is_typed(ctx, name):
            of = "a hub id, and this is a statistics file" if statistics_file else "a statistics file, and this is none"
            raise InputError(f"--{name} {ctx.params[name]}: goes with {of}; leave it out")
    if statistics_file:
        from moekern.statistics.file import Statistics

        statistics = Statistics.load(model)
        found, tell = enough(statistics, criterion, keep)
        result({**statistics.header, "enough": found}, tell)
        return

    from moekern.estimation.overview import overview

    checkpoint = headers_of(model, revision)
    seen, plan = overview(checkpoint), _merged_by(checkpoint)

    def shown() -> None:
        show_overview(seen)
        if plan is not None:
            show_groups(plan)

    result({**asdict(seen), **({} if plan is None else {"plan": json.loads(plan.to_json())})}, shown)


def _merged_by(checkpoint: Checkpoint) -> Plan | None:
    """The plan that merged experts of a checkpoint, as the file in it says; what is no plan is told."""
    from moekern.checkpoint.folder import PLAN_FILE
    from moekern.checkpoint.strict_json import read_json
    from moekern.plan.document import plan_of

    path = checkpoint.folder / PLAN_FILE
    if not os.path.lexists(path):
        return None
    try:
        plan = plan_of(read_json(path).get("plan"), f"{path}: plan")
    except InputError as error:
        say(str(error))
        return None
    return plan if plan.merges else None


def show_groups(plan: Plan) -> None:
    """Of each layer the experts that others were merged into, by their numbers in the original."""
    from moekern.plan.groups import merged_groups

    rows = []
    for key, layer in plan.layers.items():
        groups = merged_groups(layer).items()
        rows.append((key, "; ".join(f"{e} <- {' '.join(str(m) for m in group if m != e)}" for e, group in groups)))
    show("merged into experts that stay, by their numbers in the original", ("layer", "experts"), rows)


def _channels(found: Overview) -> str:
    width = "not known" if found.width is None else str(found.width)
    return f"{width}; all stay: {found.not_narrowed}" if found.not_narrowed else f"{width}; some can go"


def show_overview(found: Overview) -> None:
    """The checkpoint's experts and what pruning would leave."""
    from moekern.checkpoint.contents import lines_left_out

    layers = found.moe_layers
    groups = f"{found.n_group} (top {found.topk_group})" if found.n_group > 1 else "none"
    show(
        found.model,
        ("what", "value"),
        (
            ("family", found.family),
            ("MoE layers", f"{len(layers)} ({layers[0]} to {layers[-1]})"),
            ("experts a layer, top-k", f"{found.num_experts}, {found.top_k}"),
            ("channels an expert", _channels(found)),
            ("router", f"{found.score}, groups: {groups}"),
            ("MTP layers with experts", ", ".join(found.mtp_layers) or "none"),
            ("files, tensors", f"{found.shards}, {found.tensors}"),
            ("size", sized(found.total_bytes)),
            ("routed experts", f"{sized(found.routed_bytes)} ({found.routed_bytes / max(1, found.total_bytes):.1%})"),
            ("their types", ", ".join(f"{name} {sized(n)}" for name, n in found.dtypes.items())),
            ("one expert of one layer", sized(found.bytes_per_expert)),
            ("run by", RUN_BY.get(found.run_by) or f"nothing: {found.not_run}; pruned, and verified by its bytes"),
            *((("gradient tier", f"no: {found.no_gradient}"),) if found.no_gradient else ()),
            *((("note", found.note),) if found.note else ()),
        ),
    )
    for note in found.notes:
        say(note)
    if found.left_out:
        say(f"not copied when it is pruned: {lines_left_out(found.left_out)}")
    shares = [n for n in found.legal_counts if n * 8 % found.num_experts == 0]
    if not found.legal_counts:  # it is not pruned again
        return
    show(
        "kept experts a layer (any legal count works; eighths shown)",
        ("kept", "share", "size"),
        [(n, f"{n / found.num_experts:.1%}", sized(found.bytes_at(n))) for n in shares],
    )
