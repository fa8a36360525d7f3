"""The command `calibrate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.cli import ranks
from moekern.cli.console import hint, say, show
from moekern.cli.options import (
    BackendOption,
    Chunk,
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
    Revision,
    Seed,
    SequenceLength,
    Spill,
    Strict,
    Thinking,
    ThinkingOption,
    Tiers,
    Tokens,
    TrustRemoteCode,
    UnusedBatchSize,
    check_criteria,
    compute_of,
    result,
    say_unused,
    text_of,
)
from moekern.files import check_new, standing
from moekern.team import Part

if TYPE_CHECKING:
    from moekern.statistics.file import Statistics


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="The statistics file to write.")],
    data: Data = None,
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
    tier: Tiers = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(help="Measure what this criterion needs; repeatable. Most need no tier.", callback=check_criteria),
    ] = None,
    replay_tokens: Annotated[
        int, typer.Option(help="Tokens of each domain on which tier replay runs all experts.")
    ] = 512,
    part: Annotated[
        str | None,
        typer.Option(help="I/N: measure this share of the text only, for `merge` of all parts. Not set by torchrun."),
    ] = None,
    backend: BackendOption = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Stream text through the model one layer at a time and measure its experts."""
    share = Part.parse(part) if part else None
    check_new(out)  # before anything is downloaded, or torch is imported

    from moekern.cli import pipeline
    from moekern.criteria import criterion_named

    say_unused(batch_size)
    text = text_of(
        data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column, thinking=thinking,
        strict=strict, pack=pack, chunk=chunk, seed=seed,
    )  # fmt: skip
    compute = compute_of(
        device=device, dtype=dtype, backend=backend, memory=memory, gpu_memory=gpu_memory,
        spill=spill or standing(out.parent), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    compute = ranks.together(compute)
    statistics = pipeline.calibrate_to(
        ranks.folder_of(model, revision, compute.team), text, compute, out,
        tiers=(*(tier or ()), *(each for name in criterion or () for each in criterion_named(name).tiers)),
        replay_tokens=replay_tokens, part=share,
    )  # fmt: skip
    show_result = show_statistics if share is None else show_part
    result({"out": str(out), **statistics.header}, lambda: show_result(statistics, out))


def show_part(measured: Statistics, out: Path) -> None:
    """What a part has measured, and what is to be done with it."""
    own = measured.header["part"]
    tokens = sum(measured.header["tokens"].values())
    of = f"{len(measured.domains)} segments with {tokens} of {sum(own['tokens'].values())} tokens"
    say(f"{out}: part {own['number']} of {own['of']}: {of}; `moekern merge` makes statistics of all parts")


def show_statistics(measured: Statistics, out: Path) -> None:
    """Tokens per domain and how evenly they reach the experts."""
    from moekern.statistics.coverage import coverage, too_thin

    rows = []
    for key in measured.layers:
        s = measured.layer(key, tiers=())
        counts = s.count.double()
        idle = int((counts == 0).sum())
        mean_norm = float(s.norm_sum.sum() / counts.sum().clamp(min=1))
        rows.append((key, s.num_experts, idle, int(counts.min()), int(counts.max()), f"{mean_norm:.4g}"))
    hint(too_thin(coverage(measured)))
    tokens: Mapping[str, int] = measured.header["tokens"]
    say("tokens: " + ", ".join(f"{name} {n}" for name, n in tokens.items()))
    show(str(out), ("layer", "experts", "idle", "fewest tokens", "most tokens", "mean output norm"), rows)
