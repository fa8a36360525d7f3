"""The command `evaluate`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moekern.cli import ranks
from moekern.cli.console import finite, say
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
from moekern.cli.replacing import ConstantsOf
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


def evaluate(
    model: Model,
    plans: Annotated[
        list[Path] | None,
        typer.Argument(help="Plans to apply on the fly; with --tasks also folders of other models."),
    ] = None,
    statistics: ConstantsOf = None,
    data: Data = None,
    tasks: TasksOption = None,
    task_dir: TaskDir = None,
    shots: Shots = None,
    limit: Limit = None,
    max_gen_toks: MaxGenToks = None,
    preset: Preset = None,
    tokens: Tokens = "1M",
    sequence_length: SequenceLength = 2048,
    pack: Pack = True,
    batch_size: BatchSize = 1,
    column: Column = None,
    thinking: ThinkingOption = Thinking.row,
    strict: Strict = False,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result there too: .json, or .csv of losses.")] = None,
    best: Annotated[
        Path | None, typer.Option(help="Write the plan that is nearest to the original there, with how all did in it.")
    ] = None,
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
    """Held-out loss per domain of the original and of plans, in one pass over the weights, differences between plans
    paired by sequence; or scores at --tasks."""
    from moekern.cli import pipeline
    from moekern.cli.judged import judged_document, judged_rows, show_judged
    from moekern.evaluation.choice import CHOICE, choice_document
    from moekern.rows import csv_text

    given = [*(data or ()), *((preset.value,) if preset else ())]
    asked = asked_of(
        tasks=tasks, task_dir=task_dir, shots=shots, limit=limit, max_gen_toks=max_gen_toks, seed=seed, text=given
    )
    check_written(out, best, len(plans or ()), scored=asked is not None)
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
        losses = pipeline.evaluate_plans(folder, text, compute, named, statistics=statistics, restart=restart)
        document, table = judged_document(losses), lambda: show_judged(losses)
        rows = judged_rows(losses)
    else:
        scores = scores_of(folder, folders, named, asked, compute, restart=restart)
        document, table, rows = document_of(scores, asked), lambda: show_scores(scores), []
    if best is not None:
        taken = choice_document(losses)
        chosen = named[taken["chosen"]]
        make_parents(best)
        replace(chosen, provenance={**chosen.provenance, CHOICE: taken}).save(best, new=True)
        document = {**document, "best": {"plan": taken["chosen"], "out": str(best)}}
    if out is not None:
        make_parents(out)
        content = csv_text(rows) if out.suffix == ".csv" else json.dumps(finite(document), indent=1) + "\n"
        write_bytes(out, content.encode(), new=True)
    result(document, table)
    if best is not None:
        say(f"{best}: the plan {document['best']['plan']}; judge it on text that did not choose it")


def check_written(out: Path | None, best: Path | None, plans: int, *, scored: bool) -> None:
    """Raise InputError for files that scores, losses or a plan cannot be written to, before anything is measured."""
    if best is not None:
        check_new(best, "--best")
        if scored:
            raise InputError(f"--best {best}: the nearest plan is found by losses; leave --tasks or this out")
        if plans < 2:
            raise InputError(f"--best {best}: takes one of several plans; name two or more after the model")
    if out is not None:
        check_new(out)
        if out.suffix not in (".json", ".csv")[: 1 if scored else 2]:
            kinds = "scores are written as .json" if scored else "losses are written as .json or .csv"
            raise InputError(f"--out {out}: {kinds}; name such a file")
