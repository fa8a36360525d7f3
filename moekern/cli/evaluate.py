"""The command `evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli import continuing, ranks
from moekern.cli.console import finite, hint, say
from moekern.cli.continuing import Continue, Decode, NewTokens, Prompts, PromptTokens, Steer
from moekern.cli.given import compute_of, named_plans, result, text_of
from moekern.cli.options import (
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
    at_least,
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

if TYPE_CHECKING:
    from moekern.data.text import Text
    from moekern.evaluation.losses import Evaluation
    from moekern.model.compute import Compute
    from moekern.plan.document import Plan

Plans = Annotated[
    list[Path] | None,
    typer.Argument(help="Plans to apply on the fly; with --tasks also folders of other models."),
]
TogetherOption = Annotated[
    int | None,
    typer.Option(
        help=f"Sequences computed at a time. Default: 1, and {continuing.TOGETHER} prompts.", callback=at_least(1)
    ),
]
ResultOption = Annotated[Path | None, typer.Option(help="Write the result there too: .json, or .csv of losses.")]
Best = Annotated[
    Path | None, typer.Option(help="Write the plan that is nearest to the original there, with how all did in it.")
]
Layers = Annotated[
    bool,
    typer.Option(
        "--layers",
        help="Also hold each layer's output, and its router's choice, against the original's: how far they are apart.",
    ),
]


def evaluate(
    model: Model,
    plans: Plans = None,
    statistics: ConstantsOf = None,
    data: Data = None,
    tasks: TasksOption = None,
    task_dir: TaskDir = None,
    shots: Shots = None,
    limit: Limit = None,
    max_gen_toks: MaxGenToks = None,
    continued: Continue = None,
    prompts: Prompts = None,
    prompt_tokens: PromptTokens = None,
    new_tokens: NewTokens = None,
    decode: Decode = None,
    steer: Steer = None,
    preset: Preset = None,
    tokens: Tokens = "1M",
    sequence_length: SequenceLength = None,
    pack: Pack = True,
    batch_size: TogetherOption = None,
    column: Column = None,
    thinking: ThinkingOption = Thinking.row,
    strict: Strict = False,
    seed: Seed = 0,
    out: ResultOption = None,
    best: Best = None,
    layers: Layers = False,
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
    paired by sequence; or scores at --tasks; or whether what they write behind prompts ends, or loops (--continue)."""
    prompted = continuing.asked_of(
        sources=continued, prompts=prompts, prompt_tokens=prompt_tokens, new_tokens=new_tokens, decode=decode,
        steer=steer, others={"--tasks": tasks, "--data": data, "--preset": preset},
    )  # fmt: skip
    asked = asked_of(
        tasks=tasks, task_dir=task_dir, shots=shots, limit=limit, max_gen_toks=max_gen_toks, seed=seed,
        text=[*(data or ()), *((preset.value,) if preset else ())],
    )  # fmt: skip
    kind = "continuations" if prompted is not None else "scores" if asked is not None else "losses"
    folders = [path for path in plans or () if path.is_dir()]
    check_written(out, best, len(plans or ()), kind, layers=layers)
    if folders and asked is None:
        raise InputError(f"{folders[0]}: a folder, and no plan; give --tasks to score other models beside", kind="plan")
    text = text_of(
        data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column, thinking=thinking,
        strict=strict, pack=pack, batch_size=batch_size or (1 if prompted is None else continuing.TOGETHER), seed=seed,
    )  # fmt: skip
    compute = ranks.together(compute_of(
        device=device, dtype=dtype, memory=memory, gpu_memory=gpu_memory, spill=spill,
        trust_remote_code=trust_remote_code,
    ))  # fmt: skip
    named = named_plans("evaluate", [path for path in plans or () if path not in folders])
    if statistics is not None and not any(plan.replace is not None for plan in named.values()):
        raise InputError("--statistics: no plan that is named replaces experts by constants; leave it out")
    if not named and not folders and not steer:
        say(f"no plan is named: {kind} of the original alone; plans to compare it with may follow the other words")
    folder = ranks.folder_of(model, revision, compute.team)
    if prompted is not None:
        written = continuing.written_of(folder, prompted, text, named, compute, statistics, restart=restart)
        found = Found(continuing.document_of(written, prompted, seed), lambda: continuing.show_written(written))
    elif asked is not None:
        scores = scores_of(folder, folders, named, asked, compute, restart=restart)
        found = Found(document_of(scores, asked), lambda: show_scores(scores))
    else:
        found = _losses(folder, text, compute, named, statistics, best, out, layers=layers, restart=restart)
    models = _models(folder, folders, named, () if prompted is None else prompted.steering)
    found = replace(found, document={**found.document, "models": models})
    _write(out, found)
    result(found.document, found.show)
    hint(found.said)


def _models(
    folder: Path, others: Sequence[Path], plans: Mapping[str, Plan], steering: Sequence[tuple[str, str, int, float]]
) -> dict[str, dict[str, str]]:
    """What each row is of: the fingerprint of a checkpoint, the digest of the model that a plan makes with the
    fingerprint that the plan names, or else the original's, or the map that steers."""
    from moekern.checkpoint.folder import open_checkpoint
    from moekern.cli.judged import models_judged

    own = {str(other): {"fingerprint": open_checkpoint(other).fingerprint} for other in others}
    steered = {name: {"steered": path} for name, path, *_ in steering}
    return models_judged(open_checkpoint(folder).fingerprint, plans) | own | steered


@dataclass(frozen=True)
class Found:
    """What was measured: as JSON, as it is shown, as rows of a table, where it has any, and what is said of it."""

    document: Mapping[str, Any]
    show: Callable[[], None]
    rows: Sequence[Mapping[str, Any]] = ()
    said: str | None = None


def _losses(
    folder: Path,
    text: Text,
    compute: Compute,
    plans: Mapping[str, Plan],
    statistics: Path | None,
    best: Path | None,
    out: Path | None,
    *,
    layers: bool,
    restart: bool,
) -> Found:
    """Losses, and the nearest plan written to `best` where that is asked for."""
    from moekern.cli import pipeline
    from moekern.cli.judged import judged_document, judged_rows, show_judged, untold

    losses = pipeline.evaluate_plans(
        folder, text, compute, plans, statistics=statistics, layers=layers, restart=restart
    )
    for line in untold(losses, written=out is not None):
        say(line)
    document, said = judged_document(losses), None
    if best is not None:
        name = _save_best(losses, plans, best)
        document["best"] = {"plan": name, "out": str(best)}
        said = f"{best}: the plan {name}; judge it on text that did not choose it"
    return Found(document, lambda: show_judged(losses), judged_rows(losses), said)


def _save_best(losses: Evaluation, plans: Mapping[str, Plan], best: Path) -> str:
    """Write the plan that is nearest to the original, with how all did; its name."""
    from moekern.evaluation.choice import CHOICE, choice_document

    taken = choice_document(losses)
    name: str = taken["chosen"]
    make_parents(best)
    replace(plans[name], provenance={**plans[name].provenance, CHOICE: taken}).save(best, new=True)
    return name


def _write(out: Path | None, found: Found) -> None:
    """The same to a file, where one is named."""
    from moekern.rows import csv_text

    if out is not None:
        make_parents(out)
        whole = json.dumps(finite(found.document), indent=1) + "\n"
        write_bytes(out, (csv_text(found.rows) if out.suffix == ".csv" else whole).encode(), new=True)


def check_written(out: Path | None, best: Path | None, plans: int, kind: str, *, layers: bool) -> None:
    """Raise InputError for files that a result of this kind, or a plan, cannot be written to, and for layers that are
    asked for where none are told, before anything is measured."""
    if layers and kind != "losses":
        raise InputError(f"--layers: goes with losses, not with {kind}; leave it out")
    if best is not None:
        check_new(best, "--best")
        if kind != "losses":
            raise InputError(f"--best {best}: the nearest plan is found by losses, not by {kind}; leave this out")
        if plans < 2:
            raise InputError(f"--best {best}: takes one of several plans; name two or more after the model")
    if out is not None:
        check_new(out)
        suffixes = (".json", ".csv") if kind == "losses" else (".json",)
        if out.suffix not in suffixes:
            raise InputError(f"--out {out}: {kind} are written as {' or '.join(suffixes)}; name such a file")
