"""The command `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.cli import ranks
from moekern.cli.console import finite, say, show
from moekern.cli.given import compute_of, named_plans, result, text_of
from moekern.cli.options import (
    BatchSize,
    Column,
    Data,
    Device,
    DtypeOption,
    GpuMemory,
    Json,
    Memory,
    Model,
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
from moekern.cli.tasks import (
    Limit,
    MaxGenToks,
    Shots,
    TaskDir,
    TasksOption,
    asked_of,
    document_of,
    scores_of,
    show_scores,
)
from moekern.errors import InputError
from moekern.files import check_new, make_parents, write_bytes

if TYPE_CHECKING:
    from moekern.evaluation.losses import Evaluation


def evaluate(
    model: Model,
    plans: Annotated[
        list[Path] | None,
        typer.Argument(help="Plans to apply on the fly; with --tasks also folders of other models."),
    ] = None,
    data: Data = None,
    tasks: TasksOption = None,
    task_dir: TaskDir = None,
    shots: Shots = None,
    limit: Limit = None,
    max_gen_toks: MaxGenToks = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON to this new file, too.")] = None,
    preset: Preset = None,
    tokens: Tokens = "1M",
    sequence_length: SequenceLength = 2048,
    pack: Pack = True,
    batch_size: BatchSize = 1,
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
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Held-out loss per domain of the original and of plans, in one pass over the weights; or scores at --tasks."""
    from moekern.cli import pipeline
    from moekern.evaluation.losses import losses_document

    if out is not None:
        check_new(out)
    given = [*(data or ()), *((preset.value,) if preset else ())]
    asked = asked_of(
        tasks=tasks, task_dir=task_dir, shots=shots, limit=limit, max_gen_toks=max_gen_toks, seed=seed, text=given
    )
    folders = [path for path in plans or () if path.is_dir()]
    if folders and asked is None:
        raise InputError(f"{folders[0]}: a folder, and no plan; give --tasks to score other models beside", kind="plan")
    text = text_of(
        data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column, thinking=thinking,
        strict=strict, pack=pack, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    compute = compute_of(
        device=device,
        dtype=dtype,
        memory=memory,
        gpu_memory=gpu_memory,
        spill=spill,
        trust_remote_code=trust_remote_code,
    )
    compute = ranks.together(compute)
    named = named_plans("evaluate", [path for path in plans or () if path not in folders])
    if not named and not folders:
        what = "the loss" if asked is None else "scores"
        say(f"no plan is named: {what} of the original alone; plans to compare it with may follow the other words")
    folder = ranks.folder_of(model, revision, compute.team)
    if asked is None:
        losses = pipeline.evaluate_plans(folder, text, compute, named, restart=restart)
        document, table = losses_document(losses), lambda: show_losses(losses)
    else:
        scores = scores_of(folder, folders, named, asked, compute, restart=restart)
        document, table = document_of(scores, asked), lambda: show_scores(scores)
    if out is not None:
        make_parents(out)
        write_bytes(out, (json.dumps(finite(document), indent=1) + "\n").encode(), new=True)
    result(document, table)


def show_losses(table: Evaluation) -> None:
    """Loss per domain, a row a plan."""
    from moekern.evaluation.losses import mean_loss

    domains = list(next(iter(table.values())))
    rows = [
        (
            name,
            *(f"{row[d].nll:.4f}" for d in domains),
            f"{mean_loss({d: row[d].nll for d in domains}):.4f}",
            f"{mean_loss({d: row[d].kl for d in domains}):.4f}",
            f"{mean_loss({d: row[d].top1 for d in domains}):.1%}",
        )
        for name, row in table.items()
    ]
    show("held-out loss, nats per token", ("plan", *domains, "mean", "KL to original", "same top-1"), rows)
