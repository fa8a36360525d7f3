"""The command `lottery`."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli import ranks
from moekern.cli.console import say, show
from moekern.cli.given import compute_of, result, text_of
from moekern.cli.options import (
    Chunk,
    Column,
    CriterionOption,
    Data,
    Device,
    DtypeOption,
    GpuMemory,
    Json,
    Keep,
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
from moekern.cli.recover import Kl, Next, Rate, StepTokens, Top, Train, training_of
from moekern.criteria.table import DEFAULT
from moekern.errors import InputError
from moekern.files import standing
from moekern.router import parse_keep

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moekern.data.text import Text
    from moekern.evaluation.losses import Loss
    from moekern.model.compute import Compute
    from moekern.recovery.lottery import Drawn, Lottery

WORK = "lottery"  # in the work folder
PAPER = "2504.05586"
TokensPerRound = Annotated[
    str,
    typer.Option(help="Tokens trained on in each round, as 200k; 200k,doubling: twice as many in each later one."),
]
Paper = Annotated[
    str | None,
    typer.Option(
        help=f"{PAPER}: its settings (loss of the next token, rate 1e-6, 8 sequences a step) instead of --kl, --next, "
        "--rate, --step-tokens. It does not say what trains: --train does."
    ),
]


def lottery(
    model: Model,
    keep: Keep,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    data: Data = None,
    criterion: CriterionOption = DEFAULT,
    rounds: Annotated[int, typer.Option(help="Experts go in so many rounds.")] = 4,
    tokens_per_round: TokensPerRound = "200k",
    train: Train = "all",
    paper: Paper = None,
    kl: Kl = 1.0,
    next_token: Next = 0.0,
    top: Top = "64",
    rate: Rate = None,
    step_tokens: StepTokens = None,
    control: Annotated[
        bool, typer.Option(help="Cut once too and train that on all of the text, to compare with; it is not kept.")
    ] = True,
    keep_rounds: Annotated[
        bool, typer.Option("--keep-rounds", help="Leave the checkpoint of each round in OUT.moekern/lottery/.")
    ] = False,
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
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Cut a model in rounds, each of which scores the experts that are left anew and trains what stays (lottery
    subnetworks of MC-Suite, arXiv:2504.05586).

    The text is calibrated on and trained on, each round on a part of its own; a tenth judges. After a kill the same
    command goes on.
    """
    share, (first, doubling) = parse_keep(keep), _per_round(tokens_per_round)
    training = training_of(train=train, kl=kl, next=next_token, top=top, rate=rate, step_tokens=step_tokens, seed=seed)

    from moekern.checkpoint.folder import open_checkpoint
    from moekern.cli import whole_recovery
    from moekern.data.text import length_for
    from moekern.pruning.work_folder import check_target
    from moekern.recovery import lottery as stage

    whole_recovery.clean_up(out, WORK)
    check_target(out)
    if paper is not None:
        if paper != PAPER:
            raise InputError(f"--paper {paper}: expected {PAPER}")
        say("--paper: a rate of 1e-6 moves a weight by 1e-6 a step: in bfloat16 few change before hundreds of steps")
    text = text_of(
        data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column, thinking=thinking,
        strict=strict, pack=pack, chunk=chunk, seed=seed,
    )  # fmt: skip
    if not text.data:
        raise InputError("lottery: it trains on text: give --data", kind="option")
    compute = ranks.together(compute_of(
        device=device, dtype=dtype, memory=memory, gpu_memory=gpu_memory, spill=spill or standing(out.parent),
        trust_remote_code=trust_remote_code,
    ))  # fmt: skip
    folder = ranks.folder_of(model, revision, compute.team)
    if paper is not None:
        step = stage.PAPER_SEQUENCES * length_for(open_checkpoint(folder), sequence_length)
        training = replace(stage.PAPER, train=training.train, step_tokens=step)
    method = stage.Lottery(share, rounds, criterion, first, doubling, training, seed)
    drawn = _drawn(folder, text, method, compute, out, control=control, keep_rounds=keep_rounds, restart=restart)
    result(_document(drawn, method), lambda: show_drawn(drawn, method))


def _drawn(
    folder: Path, text: Text, method: Lottery, compute: Compute, out: Path,
    *, control: bool, keep_rounds: bool, restart: bool,
) -> Drawn:  # fmt: skip
    """All rounds. What a run that was stopped has left is used again."""
    from moekern.architectures import find_layout
    from moekern.checkpoint.folder import open_checkpoint
    from moekern.cli import pipeline
    from moekern.cli.whole_recovery import changing_progress
    from moekern.files import working
    from moekern.recovery.lottery import lottery

    checkpoint = open_checkpoint(folder)
    compute = pipeline.told_compute(compute, checkpoint, find_layout(checkpoint))
    data = text.read(checkpoint, trust_remote_code=compute.trust_remote_code)
    with working(out) as side:
        with changing_progress() as shown:
            drawn = lottery(
                checkpoint, data, method, out, side / WORK, compute,
                control=control, keep_rounds=keep_rounds, restart=restart, tell=say, progress=shown,
            )  # fmt: skip
        if not keep_rounds:
            shutil.rmtree(side / WORK)
    return drawn


def _per_round(text: str) -> tuple[int, bool]:
    """Tokens of the first round, and whether they double."""
    from moekern.data.mixes import parse_tokens

    first, comma, then = text.partition(",")
    try:
        count = parse_tokens(first)
    except InputError:
        count = None
    if not count or (comma and then != "doubling"):
        raise InputError(f"--tokens-per-round {text}: expected a number of tokens, as 200k or 200k,doubling")
    return count, bool(comma)


def show_drawn(drawn: Drawn, method: Lottery) -> None:
    """The losses of each round and of the control, on text that decided nothing."""
    rows: list[tuple[Any, ...]] = [("original", "", "", *_cells(drawn.original))]
    for number, each in enumerate(drawn.rounds, start=1):
        rows.append((f"round {number}, dropped", each.experts, "", *_cells(each.dropped)))
        rows.append((f"round {number}, trained", each.experts, each.tokens, *_cells(each.trained)))
    if drawn.control is not None:
        rows.append(("one cut, dropped", drawn.control.experts, "", *_cells(drawn.control.dropped)))
        rows.append(("one cut, trained", drawn.control.experts, drawn.control.tokens, *_cells(drawn.control.trained)))
    count = sum(loss.tokens for loss in drawn.original.values())
    show(
        f"on {count} tokens that decided nothing (--criterion {method.criterion})",
        ("model", "experts", "tokens trained on", "loss, nats a token", "KL to original"),
        rows,
    )
    for note in drawn.notes:
        say(note)
    say(f"{drawn.out}: load it as any checkpoint")


def _cells(row: Mapping[str, Loss]) -> tuple[str, str]:
    from moekern.evaluation.losses import mean_of

    return f"{mean_of(row, 'nll'):.4f}", f"{mean_of(row, 'kl'):.4f}"


def _document(drawn: Drawn, method: Lottery) -> dict[str, Any]:
    """The same as JSON."""

    from moekern.evaluation.losses import row_document

    def told(each: Any) -> dict[str, Any]:
        parts = {name: row_document(getattr(each, name)) for name in ("dropped", "trained")}
        return {"experts": each.experts, "tokens": each.tokens, **parts}

    return {
        "out": str(drawn.out),
        "method": asdict(method),
        "original": row_document(drawn.original),
        "rounds": [told(each) for each in drawn.rounds],
        "control": None if drawn.control is None else told(drawn.control),
        "notes": list(drawn.notes),
    }
