"""The command `run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.cli.console import say
from moekern.cli.options import (
    Chunk,
    Column,
    CriterionOption,
    Data,
    Device,
    DtypeOption,
    Json,
    Keep,
    Model,
    MtpOption,
    Pack,
    Preset,
    ProtectSuper,
    Revision,
    Seed,
    SequenceLength,
    Strict,
    Thinking,
    ThinkingOption,
    Tokens,
    TrustRemoteCode,
    UnusedBatchSize,
    compute_of,
    folder_of,
    result,
    say_unused,
    text_of,
)
from moekern.cli.prune import show_pruned
from moekern.cli.verify import show_verdict

if TYPE_CHECKING:
    from moekern.cli.pipeline import Run


def run(
    model: Model,
    keep: Keep,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    data: Data = None,
    criterion: CriterionOption = "reap",
    preset: Preset = None,
    tokens: Tokens = "1M",
    sequence_length: SequenceLength = 2048,
    pack: Pack = True,
    chunk: Chunk = None,
    batch_size: UnusedBatchSize = None,
    column: Column = None,
    thinking: ThinkingOption = Thinking.row,
    strict: Strict = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = None,
    protect_super: ProtectSuper = False,
    mtp: MtpOption = None,
    forward: Annotated[
        bool, typer.Option(help="Prove the result by comparing logits with the masked original (two more passes).")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Calibrate, plan, prune and verify. Statistics and plan stay in OUT.moekern/ and are used again after a kill."""
    from moekern.cli import pipeline
    from moekern.criteria import criterion_named
    from moekern.plan.document import Plan
    from moekern.plan.provenance import remarks
    from moekern.pruning.work_folder import check_target
    from moekern.router import parse_keep

    chosen, share = criterion_named(criterion), parse_keep(keep)  # before anything is downloaded
    if not pipeline.has_run(out):
        check_target(out)
    say_unused(batch_size)
    text = text_of(
        data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column, thinking=thinking,
        strict=strict, pack=pack, chunk=chunk, seed=seed,
    )  # fmt: skip
    compute = compute_of(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    done = pipeline.run_stages(
        folder_of(model, revision), text, compute, out,
        criterion=chosen, keep=share, protect_super=protect_super,
        mtp=mtp.value if mtp else "prune", forward=forward,
    )  # fmt: skip
    for line in remarks(Plan.load(done.plan)):
        say(line)
    result(done.document(), lambda: show_run(done))
    if not done.verdict.good:
        raise typer.Exit(1)


def show_run(done: Run) -> None:
    """The last two stages' results; the artefacts' places."""
    show_pruned(done.pruned)
    show_verdict(done.verdict)
    say(f"statistics: {done.statistics}; plan: {done.plan}")
