"""The command `refit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moekern.cli import ranks
from moekern.cli.console import say
from moekern.cli.given import compute_of, result, say_unused, text_of
from moekern.cli.options import (
    Chunk,
    Column,
    Computed,
    ComputedDtype,
    CopyMode,
    CopyOption,
    Data,
    Device,
    DtypeOption,
    GpuMemory,
    Json,
    Memory,
    Model,
    MtpOption,
    Pack,
    Preset,
    RefineOption,
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
    UnusedBatchSize,
    WidthOption,
)
from moekern.cli.prune import show_pruned
from moekern.cli.verify import show_verdict
from moekern.errors import InputError
from moekern.files import standing


def refit(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="Which experts stay.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; it must not exist.")] = None,
    data: Data = None,
    refine: RefineOption = False,
    width: WidthOption = None,
    computed_dtype: ComputedDtype = Computed.source,
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
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    spill: Spill = None,
    mtp: MtpOption = None,
    copy: CopyOption = CopyMode.auto,
    forward: Annotated[
        bool, typer.Option(help="Prove the result by comparing logits with the model made in memory (two more passes).")
    ] = True,
    verify: Annotated[
        Path | None,
        typer.Option(
            help="Write nothing: refit the first layer and one by chance again, and compare with this folder."
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="With --verify: all layers.")] = False,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Prune, with what stays fitted by least squares to what the original's layers make: one more pass, no labels, no
    gradients through the model.

    Two streams of hidden states go through the layers, the original's and the pruned one's. After a kill the same
    command goes on, in the layer that it was in. With --verify in the place of --out the same command proves what an
    earlier one has written.
    """
    from moekern.cli import whole_refit
    from moekern.cli.refitting import show_refit
    from moekern.plan.document import Plan
    from moekern.pruning.work_folder import check_target

    if (out is None) == (verify is None):
        raise InputError("--out, --verify: give one of the two")
    if full and verify is None:
        raise InputError("--full: goes with --verify")
    given = Plan.load(plan)
    if out is not None and not whole_refit.has_run(out):
        check_target(out)
    say_unused(batch_size)
    text = text_of(
        data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column, thinking=thinking,
        strict=strict, pack=pack, chunk=chunk, seed=seed,
    )  # fmt: skip
    compute = compute_of(
        device=device, dtype=dtype, memory=memory, gpu_memory=gpu_memory,
        spill=spill or standing((out or verify or Path()).parent),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    compute = ranks.together(compute)
    asked = whole_refit.Asked(
        width=width,
        refine=refine,
        computed=computed_dtype.value,
        mtp=mtp.value if mtp else None,
        copy=copy.value,
        forward=forward,
        restart=restart,
    )
    folder = ranks.folder_of(model, revision, compute.team)
    if out is None:
        assert verify is not None
        verdict = whole_refit.verify_stages(folder, given, text, compute, verify, asked, full=full)
        result(verdict.document(), lambda: show_verdict(verdict))
        if not verdict.good:
            raise typer.Exit(1)
        return
    found = whole_refit.refit_stages(folder, given, text, compute, out, asked)

    def table() -> None:
        show_refit(found.refit)
        show_pruned(found.pruned)
        show_verdict(found.verdict)
        say(f"plan: {found.plan}")

    result(found.document(), table)
    if not found.good:
        raise typer.Exit(1)
