"""The command `evaluate`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moekern.cli import ranks
from moekern.cli.console import say
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
from moekern.errors import InputError
from moekern.files import check_new, write_bytes


def evaluate(
    model: Model,
    plans: Annotated[list[Path] | None, typer.Argument(help="Plans to apply on the fly.")] = None,
    data: Data = None,
    preset: Preset = None,
    tokens: Tokens = "1M",
    sequence_length: SequenceLength = 2048,
    pack: Pack = True,
    batch_size: BatchSize = 1,
    column: Column = None,
    thinking: ThinkingOption = Thinking.row,
    strict: Strict = False,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write losses and differences there too: .json, or .csv.")] = None,
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
    """Held-out loss per domain of the original and of plans, in one pass over the weights; differences between plans
    are paired by sequence."""
    check_written(out, best, len(plans or []))

    from moekern.cli import pipeline
    from moekern.cli.judged import judged_document, judged_rows, show_judged
    from moekern.evaluation.choice import CHOICE, choice_document
    from moekern.rows import csv_text

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
    named = named_plans("evaluate", plans or [])
    if not named:
        say("no plan is named: the loss of the original alone; plans to compare it with may follow the other words")
    folder = ranks.folder_of(model, revision, compute.team)
    losses = pipeline.evaluate_plans(folder, text, compute, named, restart=restart)
    document = judged_document(losses)
    if out is not None:
        text_out = csv_text(judged_rows(losses)) if out.suffix == ".csv" else json.dumps(document, indent=1) + "\n"
        write_bytes(out, text_out.encode(), new=True)
    if best is not None:
        taken = choice_document(losses)
        chosen = named[taken["chosen"]]
        replace(chosen, provenance={**chosen.provenance, CHOICE: taken}).save(best, new=True)
        document["best"] = {"plan": taken["chosen"], "out": str(best)}
    result(document, lambda: show_judged(losses))
    if best is not None:
        say(f"{best}: the plan {document['best']['plan']}; judge it on text that did not choose it")


def check_written(out: Path | None, best: Path | None, plans: int) -> None:
    """Raise InputError for files that losses or a plan cannot be written to, before anything is measured."""
    if best is not None:
        check_new(best, "--best")
        if plans < 2:
            raise InputError(f"--best {best}: takes one of several plans; name two or more after the model")
    if out is None:
        return
    if out.suffix not in (".json", ".csv"):
        raise InputError(f"--out {out}: losses are written as .json or .csv; name such a file")
    check_new(out)
