"""The command `calibrate`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.cli import ranks
from moekern.cli.console import say, show
from moekern.cli.enough import enough, layer_teller
from moekern.cli.given import compute_of, result, say_unused, text_of
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
    Restart,
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
    UntilStable,
    UnusedBatchSize,
    at_least,
    check_criteria,
)
from moekern.criteria.table import DEFAULT
from moekern.errors import InputError
from moekern.files import check_new, is_folder, standing, work_path
from moekern.router import parse_keep
from moekern.team import Part

if TYPE_CHECKING:
    from moekern.statistics.file import Statistics

PartOption = Annotated[
    str | None,
    typer.Option(help="I/N: measure this share of the text only, for `merge` of all parts. Not set by torchrun."),
]
FirstOption = Annotated[
    Path | None,
    typer.Option(help="With --part: merged statistics of the same text, by whose means tier outliers is counted."),
]


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="The statistics file to write.")],
    data: Data = None,
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
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    spill: Spill = None,
    tier: Tiers = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(help="Measure what this criterion needs; repeatable. Most need no tier.", callback=check_criteria),
    ] = None,
    replay_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of each domain on which tier replay runs all experts: 512.", callback=at_least(1)),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="The share or count at which halves of the text are compared; nothing is chosen yet.")
    ] = "0.5",
    until_stable: UntilStable = None,
    part: PartOption = None,
    first: FirstOption = None,
    backend: BackendOption = None,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Stream text through the model one layer at a time and measure its experts."""
    share = Part.parse(part) if part else None
    if share is not None and until_stable is not None:
        raise InputError(
            "--until-stable: how much text is enough shows on all of it, and --part has a share; leave one out"
        )
    _forget_finished(out)
    check_new(out)  # before anything is downloaded, or torch is imported
    parse_keep(keep)

    from moekern.calibration.calibrate import REPLAY_TOKENS
    from moekern.calibration.stable import Stable
    from moekern.cli import pipeline
    from moekern.criteria import criterion_named

    tiers = (*(tier or ()), *(each for name in criterion or () for each in criterion_named(name).tiers))
    if replay_tokens is not None and "replay" not in tiers:
        raise InputError(f"--replay-tokens {replay_tokens}: goes with --tier replay")
    say_unused(batch_size)
    judged = criterion[0] if criterion else DEFAULT
    stable = None if until_stable is None else Stable(until_stable, judged, (parse_keep(keep),))
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
        tiers=tiers, replay_tokens=replay_tokens or REPLAY_TOKENS, part=share, first=first, stable=stable,
        restart=restart, told=layer_teller(judged, keep),
    )  # fmt: skip
    if share is None:
        show_all(statistics, out, judged, keep)
    else:
        result({"out": str(out), **statistics.header}, lambda: show_part(statistics, out))


def _forget_finished(out: Path) -> None:
    """Remove what a run that was killed at its very end has left beside its statistics."""
    if out.name and os.path.lexists(out) and is_folder(work_path(out)):
        from moekern.cli.parts_left import remove_parts_of
        from moekern.model.state_folder import clean_up

        remove_parts_of(out)
        clean_up(out)


def show_all(statistics: Statistics, out: Path, criterion: str, keep: str) -> None:
    """The header, how evenly tokens reach the experts, and whether they were enough."""
    try:
        found, tell = enough(statistics, criterion, keep)
    except InputError as error:  # what was measured is there; this count cannot be compared
        found, tell = {}, partial(say, f"whether the text was enough is not known: {error}")

    def show_both() -> None:
        show_statistics(statistics, out)
        tell()

    result({"out": str(out), **statistics.header, "enough": found}, show_both)


def show_part(measured: Statistics, out: Path) -> None:
    """What a part has measured, and what is to be done with it."""
    own = measured.header["part"]
    tokens = sum(measured.header["tokens"].values())
    of = f"{len(measured.domains)} segments with {tokens} of {sum(own['tokens'].values())} tokens"
    say(f"{out}: part {own['number']} of {own['of']}: {of}; `moekern merge` makes statistics of all parts")


def show_statistics(measured: Statistics, out: Path) -> None:
    """Tokens per domain and how evenly they reach the experts."""
    rows = []
    for key in measured.layers:
        s = measured.layer(key, tiers=())
        counts = s.count.double()
        idle = int((counts == 0).sum())
        mean_norm = float(s.norm_sum.sum() / counts.sum().clamp(min=1))
        rows.append((key, s.num_experts, idle, int(counts.min()), int(counts.max()), f"{mean_norm:.4g}"))
    tokens: Mapping[str, int] = measured.header["tokens"]
    say("tokens: " + ", ".join(f"{name} {n}" for name, n in tokens.items()))
    show(str(out), ("layer", "experts", "idle", "fewest tokens", "most tokens", "mean output norm"), rows)
