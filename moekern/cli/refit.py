"""The command `refit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.cli import ranks
from moekern.cli.console import say
from moekern.cli.given import compute_of, result, say_unused, text_of
from moekern.cli.options import (
    BackendOption,
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
    ReEstimate,
    RefineOption,
    Restart,
    Revision,
    Seed,
    SequenceLength,
    Spill,
    Strict,
    Targets,
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

if TYPE_CHECKING:
    from moekern.cli.whole_refit import Found


Forward = Annotated[
    bool, typer.Option(help="Prove the result by comparing logits with the model made in memory (two more passes).")
]
Verify = Annotated[
    Path | None,
    typer.Option(help="Write nothing: refit the first layer and one by chance again, and compare with this folder."),
]
Full = Annotated[bool, typer.Option("--full", help="With --verify: all layers.")]


def refit(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="Which experts stay.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; it must not exist.")] = None,
    data: Data = None,
    refine: RefineOption = False,
    width: WidthOption = None,
    re_estimate: ReEstimate = False,
    computed_dtype: ComputedDtype = Computed.source,
    target: Targets = None,
    preset: Preset = None,
    tokens: Tokens = "1M",
    sequence_length: SequenceLength = None,
    pack: Pack = True,
    chunk: Chunk = None,
    batch_size: UnusedBatchSize = None,
    column: Column = None,
    thinking: ThinkingOption = Thinking.row,
    strict: Strict = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    spill: Spill = None,
    mtp: MtpOption = None,
    copy: CopyOption = CopyMode.auto,
    forward: Forward = True,
    verify: Verify = None,
    full: Full = False,
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
    _check_flags(out, verify, full)

    from moekern.cli import whole_refit
    from moekern.plan.document import Plan
    from moekern.plan.targets import parse_target

    given = Plan.load(plan)
    if out is not None:
        whole_refit.check_out(out)
    say_unused(batch_size)
    text = text_of(
        data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column, thinking=thinking,
        strict=strict, pack=pack, chunk=chunk, seed=seed,
    )  # fmt: skip
    compute = ranks.together(compute_of(
        device=device, dtype=dtype, backend=backend, memory=memory, gpu_memory=gpu_memory,
        spill=spill or standing((out or verify or Path()).parent), trust_remote_code=trust_remote_code,
    ))  # fmt: skip
    asked = whole_refit.Asked(
        width, refine, computed_dtype.value, mtp.value if mtp else None, copy.value, forward=forward, restart=restart,
        re_estimate=re_estimate, targets=tuple(parse_target(each) for each in target or ()),
    )  # fmt: skip
    folder = ranks.folder_of(model, revision, compute.team)
    if out is not None:
        done = whole_refit.refit_stages(folder, given, text, compute, out, asked)
        result(done.document(), lambda: show_done(done), good=done.good)
    else:
        assert verify is not None
        verdict = whole_refit.verify_stages(folder, given, text, compute, verify, asked, full=full)
        result(verdict.document(), lambda: show_verdict(verdict), good=verdict.good)


def _check_flags(out: Path | None, verify: Path | None, full: bool) -> None:
    """Raise InputError for flags that do not go together."""
    if (out is None) == (verify is None):
        raise InputError("--out, --verify: give one of the two")
    if full and verify is None:
        raise InputError("--full: goes with --verify")


def show_done(done: Found) -> None:
    """What was fitted and how well, what was written, and whether it is right."""
    from moekern.cli.refitting import show_refit

    show_refit(done.refit)
    result = done.result
    show_pruned(result.pruned)
    show_verdict(result.verdict)
    for name, command in result.serve.items():
        say(f"serve with {name}: {command}")
    say(f"plan: {result.plan}")
