"""The command `prune`."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.cli import console
from moekern.cli.console import say, show
from moekern.cli.given import folder_of, parsed_size, result
from moekern.cli.options import CopyMode, CopyOption, Json, Model, MtpOption, Revision
from moekern.cli.replacing import ConstantsOf, FormOption, Replace, replaced_line, replaced_plan, vectors_of
from moekern.files import sized

if TYPE_CHECKING:
    from moekern.checkpoint.folder import Checkpoint
    from moekern.plan.document import Mtp, Plan
    from moekern.pruning.prune import Checksum, Copy, PruneReport
    from moekern.publishing.card import About
    from moekern.team import Part


class ChecksumKind(str, Enum):
    xxh3 = "xxh3"
    blake3 = "blake3"
    none = "none"


def prune(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="A plan.json, made by moekern or by hand.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    mtp: MtpOption = None,
    copy: CopyOption = CopyMode.auto,
    checksum: Annotated[
        ChecksumKind,
        typer.Option(
            help="Of every tensor, in moekern_manifest.jsonl. xxh3: of what passes through memory; blake3: reads back."
        ),
    ] = ChecksumKind.xxh3,
    reread: Annotated[
        bool, typer.Option("--reread", help="Read every file back from the disk and compare its checksums.")
    ] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Make shards anew of at most this size (5GB, 512MiB), instead of MODEL's own.")
    ] = None,
    refitted: Annotated[
        Path | None,
        typer.Option(help="The folder of tensors that a refit has computed, where PLAN says that it was made."),
    ] = None,
    replace: Replace = None,
    statistics: ConstantsOf = None,
    form: FormOption = None,
    part: Annotated[
        str | None,
        typer.Option(help="I/N: write this process's share of the shards; whoever is last finishes. Set by torchrun."),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Copy the checkpoint without the dropped experts: byte ranges only, nothing is converted. With --replace a
    constant vector stands for each of them.

    What is interrupted goes on where it was when the same command is run again.
    """
    from moekern.files import is_folder
    from moekern.plan.document import Plan
    from moekern.pruning.work_folder import check_target
    from moekern.team import Part

    limit = None if max_shard_size is None else parsed_size("--max-shard-size", max_shard_size)
    share = Part.parse(part) if part else Part.of_torchrun()
    chosen = Plan.load(plan)
    if share is None or not is_folder(out):  # before anything is downloaded; a part may come late
        check_target(out)
    chosen = replaced_plan(chosen, replace, statistics)
    source = folder_of(model, revision)
    report = prune_to(
        source, chosen, out, mtp=mtp.value if mtp else None, copy=copy.value, checksum=checksum.value, reread=reread,
        max_shard_size=limit, part=share, refitted=refitted, form=form, statistics=statistics,
    )  # fmt: skip
    result({**asdict(report), "out": str(report.out)}, lambda: show_pruned(report))


def prune_to(
    source: Checkpoint | Path,
    plan: Plan,
    out: Path,
    *,
    mtp: Mtp | None = None,
    copy: Copy = "auto",
    checksum: Checksum = "xxh3",
    reread: bool = False,
    max_shard_size: int | None = None,
    part: Part | None = None,
    again: bool = False,
    refitted: Path | None = None,
    form: str | None = None,
    statistics: Path | None = None,
    about: About | None = None,
) -> PruneReport:
    """Prune, and say how it goes. Here and not in `pipeline`, since nothing of it needs torch, but constants that are
    made of statistics."""
    from moekern.architectures import find_layout
    from moekern.checkpoint.folder import open_checkpoint
    from moekern.pruning.prune import prune as run
    from moekern.publishing.card import About

    vectors = None
    if statistics is not None:
        source = open_checkpoint(source) if isinstance(source, Path) else source
        vectors = vectors_of(plan, statistics, source, find_layout(source))
    with console.progress("pruning", "bytes") as step:
        return run(
            source, plan, out, mtp=mtp, copy=copy, checksum=checksum, reread=reread, max_shard_size=max_shard_size,
            part=part, again=again, refitted=refitted, form=form, vectors=vectors,
            about=about or About(), progress=step,
        )  # fmt: skip


def show_pruned(report: PruneReport) -> None:
    """What was written, what was not, and what has to be known about it."""
    from moekern.checkpoint.contents import lines_left_out

    if not report.finished:
        say(f"this part is written; {report.waiting} shards are left to other parts, the last of which finishes")
        return
    if report.already:
        say(f"{report.out}: was finished before, from the same model by the same plan; nothing was left to write")
        return
    narrower = report.channels_before != report.channels_after
    show(
        f"{report.out}",
        ("what", "before", "after"),
        (
            ("experts a layer", report.experts_before, report.experts_after),
            *([("channels an expert", report.channels_before, report.channels_after)] if narrower else []),
            ("bytes", sized(report.bytes_in), sized(report.bytes_out)),
            ("tensors", report.tensors_in, report.tensors_out),
            ("files", report.shards_in, report.shards_out),
        ),
    )
    ways = (("copied", report.copied), ("shared with the source", report.cloned), ("holes", report.holes),
            ("written by an earlier run", report.reused))  # fmt: skip
    rate = f", {sized((report.bytes_out - report.reused) / max(report.seconds, 1e-9))}/s"
    say(
        "; ".join(f"{sized(n)} {what}" for what, n in ways if n)
        + f" in {report.seconds:.1f} s{rate} (--copy {report.copy})"
    )
    if report.refitted:
        say(f"{report.refitted} tensors are those that were computed before")
    if report.replaced:
        say(replaced_line(report.replaced))
    say(report.mtp)
    for note in report.notes:
        say(note)
    if report.left_out:
        say(f"not copied: {lines_left_out(report.left_out)}")
