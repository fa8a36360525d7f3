"""Write the pruned checkpoint: kept bytes are copied, never converted."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.architectures import Layout, find_layout
from moekern.checkpoint.folder import MANIFEST, PLAN_FILE, Checkpoint, open_checkpoint
from moekern.errors import InputError, check_type
from moekern.files import is_folder
from moekern.plan.document import MTP_MODES, Mtp, Plan, planned_mtp
from moekern.plan.fits_model import check_plan
from moekern.plan.router_rows import routers_computed
from moekern.pruning.constants import Vectors, replaced_experts
from moekern.pruning.copying import Checksum, Copy, check_copying
from moekern.pruning.cuts import kept_experts
from moekern.pruning.narrow import narrowed_layers
from moekern.pruning.refitted import Refitted, check_refitted, open_refitted
from moekern.pruning.shards import OutputShard, output_shards
from moekern.pruning.side_files import mtp_line, side_files
from moekern.pruning.work_folder import check_target, clean_up
from moekern.pruning.writing import Progress, Tally, check_out, job_of, written
from moekern.publishing.card import About
from moekern.team import Part

__all__ = ["MANIFEST", "PLAN_FILE", "Checksum", "Copy", "Part", "PruneReport", "prune"]


@dataclass(frozen=True)
class PruneReport:
    """What was written. Bytes are those of the safetensors files.

    copy names the ways taken. finished is False where other parts have to write the rest, `waiting` shards. cloned,
    holes and copied are the bytes that this process shared with the source, left as holes and wrote; reused those that
    an earlier run had written. already: the target was finished before, so that nothing was left to do.
    """

    out: Path
    bytes_in: int
    bytes_out: int
    experts_before: int  # in each layer, or in the fullest, as config.json says it
    experts_after: int
    channels_before: int | None  # of each expert; None where the tensors do not say it
    channels_after: int | None
    layers: int
    tensors_in: int
    tensors_out: int
    shards_in: int
    shards_out: int
    copy: str
    cloned: int
    holes: int
    copied: int
    reused: int
    finished: bool
    waiting: int
    already: bool
    refitted: int  # tensors that a refit computed
    replaced: int  # experts that are constants now
    mtp: str  # one line: what happened to the MTP layers
    left_out: Mapping[str, str]  # file, or folder with a "/" at its end, that was not copied -> why
    notes: tuple[str, ...]  # a line each: what the source left open, and side files that are no plain copies
    seconds: float


def prune(
    source: Checkpoint | str | Path,
    plan: Plan,
    out: str | Path,
    *,
    mtp: Mtp | None = None,
    copy: Copy = "auto",
    checksum: Checksum = "xxh3",
    reread: bool = False,
    max_shard_size: int | None = None,
    part: Part | None = None,
    again: bool = False,
    refitted: Refitted | str | Path | None = None,
    form: str | None = None,
    vectors: Vectors | None = None,
    about: About = About(),
    progress: Progress | None = None,
) -> PruneReport:
    """Copy `source` to the new folder `out` without the experts that `plan` drops.

    Everything is checked before the first byte is written. The output grows in `NAME.moekern` beside `out` and gets
    its name at the end; what is interrupted goes on where it was when it is called again with the same arguments. The
    source is only read. Memory: headers, 32 MiB, some copies of an expert that is cut. progress: (bytes, of so many).

    mtp: "prune" keeps as many experts in MTP layers as in the fullest other layer, "drop" removes these layers, "keep"
    copies them; None does what the plan says, else "prune".
    copy: "reflink" shares blocks with the source, "kernel" uses copy_file_range, "stream" goes through memory; a named
    way is taken or refused, "auto" takes the best. checksum: of each tensor, in moekern_manifest.jsonl; "xxh3" covers
    what passes through memory, "blake3" and `reread` read every file back from the disk. max_shard_size: make shards
    anew with at most so many bytes of data, instead of one for each of the source's. part: write this part of the
    shards; the part that finds all of them written finishes. again: a target that was made of the same source by the
    same plan is no error, as it is none for a part. refitted: the folder of what a refit computed, where the plan says
    that there was one. form, vectors: of a plan that replaces the experts that it drops, how config.json and
    names say it ("compression-config", which is the default, or "approximate-experts"), and the constants where they
    are no zeros. about: what the card tells beside model and plan. Raises InputError, before anything is written, for
    what does not fit the checkpoint, a target that exists or cannot be made, and a disk without room; and for a source
    that changes.
    """
    start = time.perf_counter()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout, target = find_layout(checkpoint), Path(out)
    if again := (again or part is not None) and is_folder(target):
        clean_up(target)
    else:
        check_target(target, checkpoint.folder)
    twin = check_plan(plan, layout, checkpoint, replaced=True)
    mtp = planned_mtp(plan) if mtp is None else mtp
    _check_options(mtp, copy, checksum, max_shard_size)
    refitted = open_refitted(refitted) if isinstance(refitted, (str, Path)) else refitted
    check_refitted(refitted, plan, checkpoint.fingerprint)
    replaced = replaced_experts(checkpoint, layout, plan, form, vectors, mtp)
    kept = kept_experts(checkpoint, layout, plan, mtp if replaced is None else "keep")
    narrow = narrowed_layers(checkpoint, layout, plan, kept)
    routers = routers_computed(plan, layout)
    shards = output_shards(checkpoint, layout, kept, mtp, max_shard_size, refitted, narrow, replaced, routers)
    side = side_files(checkpoint, layout, plan, kept, shards, mtp, replaced, about)
    job = job_of(checkpoint, plan.digest, shards, side, _told(shards, refitted), target, copy, checksum, reread=reread)
    mine = _share(shards, part)
    check_out(job, target, mine, again=again)
    tally = Tally(job.passes * sum(shard.size for shard in mine) + sum(file.size for file in side), progress)
    told, noted = () if replaced is None else replaced.notes(), (note for file in side for note in file.notes)
    finished, waiting, already = (True, 0, True) if again else written(job, target, part, mine, tally)
    return PruneReport(
        out=target,
        **_before_after(checkpoint, layout, plan, kept, shards),
        copy=", ".join(sorted({job.way(shard).removesuffix("_or_stream") for shard in mine})),
        cloned=tally.cloned,
        holes=tally.holes,
        copied=tally.copied,
        reused=sum(shard.size for shard in shards) if already else tally.reused,
        finished=finished,
        waiting=waiting,
        already=already,
        refitted=sum(len(shard.new) for shard in shards),
        replaced=0 if replaced is None else sum(map(len, replaced.dropped.values())),
        mtp=mtp_line(layout, kept, plan, mtp),
        left_out=checkpoint.contents.left_out,
        notes=tuple(filter(None, (*told, twin, *checkpoint.notes, *layout.notes, *noted))),
        seconds=time.perf_counter() - start,
    )


def _before_after(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    kept: Mapping[str, Sequence[int]],
    shards: Sequence[OutputShard],
) -> dict[str, Any]:
    """The fields of a report that say what there was, and what is left."""
    return {
        "bytes_in": sum(shard.size for shard in checkpoint.shards),
        "bytes_out": sum(shard.size for shard in shards),
        "experts_before": layout.num_experts,
        "experts_after": max(len(kept[key]) for key in layout.layers),
        "channels_before": layout.width,
        "channels_after": layout.width if plan.width is None else plan.width,
        "layers": len(layout.layers),
        "tensors_in": len(checkpoint.tensors),
        "tensors_out": sum(len(shard.tensors) for shard in shards),
        "shards_in": len(checkpoint.shards),
        "shards_out": len(shards),
    }


def _told(shards: Sequence[OutputShard], refitted: Refitted | None) -> dict[str, dict[str, Any]]:
    """Shard -> what its line of the manifest says of a refit."""
    if refitted is None:
        return {}
    refits = {shard.name: shard.new for shard in shards if shard.new}
    return {name: {"refit": {"recipe": refitted.recipe, "tensors": list(names)}} for name, names in refits.items()}


def _check_options(mtp: str, copy: str, checksum: str, max_shard_size: int | None) -> None:
    if mtp not in MTP_MODES:
        raise InputError(f"--mtp {mtp}: expected one of {', '.join(MTP_MODES)}")
    check_copying(copy, checksum)
    if max_shard_size is not None:
        check_type("max_shard_size", max_shard_size, int)
    if max_shard_size is not None and max_shard_size < 1:
        raise InputError(f"--max-shard-size {max_shard_size}: expected at least one byte")


def _share(shards: Sequence[OutputShard], part: Part | None) -> list[OutputShard]:
    """The shards of a part: largest first, each to the part that has the fewest bytes; in the output's order."""
    if part is None:
        return list(shards)
    check_type("part", part, Part)
    load = [0] * part.of
    owner: dict[str, int] = {}
    for shard in sorted(shards, key=lambda s: (-s.size, s.name)):
        owner[shard.name] = load.index(min(load))
        load[owner[shard.name]] += shard.size
    return [shard for shard in shards if owner[shard.name] == part.number - 1]
