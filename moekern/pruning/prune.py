"""Write the pruned checkpoint: kept bytes are copied, never converted."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import moekern._C as _C
from moekern.architectures import find_layout
from moekern.checkpoint.folder import PLAN_FILE, Checkpoint, open_checkpoint
from moekern.errors import InputError, add_note, check_type
from moekern.files import check_new, fsync, is_folder, reason, sized, standing, work_path
from moekern.plan.document import MTP_MODES, Mtp, Plan, planned_mtp
from moekern.plan.fits_model import check_plan
from moekern.pruning.copying import (
    COPIES,
    KINDS,
    Checksum,
    Copied,
    Copy,
    Way,
    check_checksum,
    copy_shard,
    space_needed,
    way_of,
    ways,
)
from moekern.pruning.cuts import check_tables, kept_experts
from moekern.pruning.manifest import manifest
from moekern.pruning.narrow import narrowed_layers
from moekern.pruning.pieces import Piece, made_from
from moekern.pruning.preflight import check_space
from moekern.pruning.refitted import Refitted, check_refitted, open_refitted
from moekern.pruning.shards import OutputShard, output_shards
from moekern.pruning.side_files import MANIFEST, SideFile, mtp_line, side_files
from moekern.pruning.work_folder import Record, WorkFolder, check_target, clean_up, is_made, open_work
from moekern.team import Part

__all__ = ["MANIFEST", "PLAN_FILE", "Checksum", "Copy", "Part", "PruneReport", "prune"]

Progress = Callable[[int, int], None]  # bytes written, bytes to write


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
    mtp: str  # one line: what happened to the MTP layers
    left_out: Mapping[str, str]  # file, or folder with a "/" at its end, that was not copied -> why
    notes: tuple[str, ...]  # a line each: what the source left open, and side files that are no plain copies
    seconds: float


@dataclass(frozen=True)
class Job:
    """All that decides the bytes of the output, and how they come there."""

    checkpoint: Checkpoint
    plan: Plan
    shards: Sequence[OutputShard]
    origins: Mapping[str, str]  # shard -> sha256 of all that decides its bytes
    side: Sequence[SideFile]
    refitted: Refitted | None
    known_ways: Mapping[str, Way]
    checksum: Checksum
    reread: bool  # read every file back: blake3 needs it too

    def is_made(self, target: Path) -> bool:
        """Whether a finished target is what this job would make."""
        return is_made(target, {shard.name: shard.size for shard in self.shards}, self.side)

    def way(self, shard: OutputShard) -> Way:
        return way_of(shard, self.known_ways)

    @property
    def kind(self) -> str | None:
        """Of the checksums, as the manifest says it."""
        return KINDS[self.checksum]

    @property
    def passes(self) -> int:
        """How often a shard's bytes are gone through."""
        return 2 if self.reread else 1


@dataclass
class Tally:
    """Bytes so far. A byte that is read back counts again."""

    total: int
    progress: Progress | None
    cloned: int = 0
    holes: int = 0
    copied: int = 0
    reused: int = 0
    done: int = field(default=0, repr=False)

    def moving(self, nbytes: int) -> None:
        if self.progress is not None:
            self.progress(self.done + nbytes, self.total)

    def moved(self, nbytes: int) -> None:
        self.done += nbytes
        self.moving(0)


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
    that there was one. Raises InputError.
    """
    start = time.perf_counter()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout, target = find_layout(checkpoint), Path(out)
    again = (again or part is not None) and is_folder(target)
    if again:
        clean_up(target)
    else:
        check_target(target, checkpoint.folder)
    twin = check_plan(plan, layout, checkpoint)
    mtp = planned_mtp(plan) if mtp is None else mtp
    _check_options(mtp, copy, checksum, max_shard_size)
    refitted = open_refitted(refitted) if isinstance(refitted, (str, Path)) else refitted
    check_refitted(refitted, plan, checkpoint.fingerprint)
    kept = kept_experts(checkpoint, layout, plan, mtp)
    narrow = narrowed_layers(checkpoint, layout, plan, kept)
    shards = output_shards(checkpoint, layout, kept, mtp, max_shard_size, refitted, narrow)
    side = side_files(checkpoint, layout, plan, kept, shards, mtp)
    job = _job(checkpoint, plan, shards, side, refitted, standing(target.parent), copy, checksum, reread)
    mine = _share(shards, part)
    _check_out(job, target, mine, again=again)
    tally = Tally(job.passes * sum(shard.size for shard in mine) + sum(file.size for file in side), progress)
    finished, waiting, already = (True, 0, True) if again else _written(job, target, part, mine, tally)
    return PruneReport(
        out=target,
        bytes_in=sum(shard.size for shard in checkpoint.shards),
        bytes_out=sum(shard.size for shard in shards),
        experts_before=layout.num_experts,
        experts_after=max(len(kept[key]) for key in layout.layers),
        channels_before=layout.width,
        channels_after=layout.width if plan.width is None else plan.width,
        layers=len(layout.layers),
        tensors_in=len(checkpoint.tensors),
        tensors_out=sum(len(shard.tensors) for shard in shards),
        shards_in=len(checkpoint.shards),
        shards_out=len(shards),
        copy=", ".join(sorted({job.way(shard).removesuffix("_or_stream") for shard in mine})),
        cloned=tally.cloned,
        holes=tally.holes,
        copied=tally.copied,
        reused=sum(shard.size for shard in shards) if already else tally.reused,
        finished=finished,
        waiting=waiting,
        already=already,
        refitted=sum(len(shard.refitted) for shard in shards),
        mtp=mtp_line(layout, kept, plan, mtp),
        left_out=checkpoint.contents.left_out,
        notes=tuple(filter(None, (twin, *checkpoint.notes, *layout.notes, *(n for file in side for n in file.notes)))),
        seconds=time.perf_counter() - start,
    )


def _job(
    checkpoint: Checkpoint,
    plan: Plan,
    shards: Sequence[OutputShard],
    side: Sequence[SideFile],
    refitted: Refitted | None,
    place: Path,
    copy: Copy,
    checksum: Checksum,
    reread: bool,
) -> Job:
    """place: the folder that the output is made in, which decides how bytes can be copied."""
    check_tables(checkpoint, (tensor for shard in shards for tensor in shard.tensors))
    origins = {shard.name: made_from(shard.pieces(checkpoint)) for shard in shards}
    known_ways = ways(checkpoint, {name for shard in shards for name in shard.files}, place, copy)
    again = reread or checksum == "blake3"
    return Job(checkpoint, plan, shards, origins, side, refitted, known_ways, checksum, again)


def _check_options(mtp: str, copy: str, checksum: str, max_shard_size: int | None) -> None:
    if mtp not in MTP_MODES:
        raise InputError(f"--mtp {mtp}: expected one of {', '.join(MTP_MODES)}")
    if copy not in COPIES:
        raise InputError(f"--copy {copy}: expected one of {', '.join(COPIES)}")
    if max_shard_size is not None:
        check_type("max_shard_size", max_shard_size, int)
    if max_shard_size is not None and max_shard_size < 1:
        raise InputError(f"--max-shard-size {max_shard_size}: expected at least one byte")
    check_checksum(checksum)


def _check_out(job: Job, target: Path, mine: Sequence[OutputShard], *, again: bool) -> None:
    """Raise InputError where there is no room for the target, or something else stands there `again`."""
    if not again:
        needed = sum(space_needed(job.checkpoint, shard, job.known_ways) for shard in mine)
        check_space(target, needed + sum(file.size for file in job.side), len(mine) + len(job.side) + 8)
    elif not job.is_made(target):
        check_new(target, folder=True)


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


def _written(
    job: Job, target: Path, part: Part | None, mine: list[OutputShard], tally: Tally
) -> tuple[bool, int, bool]:
    """What _write tells; and whether other parts have finished while this one waited for them."""
    try:
        return *_write(job, target, part, mine, tally), False
    except InputError:
        if part is None or not job.is_made(target):
            raise
        return True, 0, True


def _write(job: Job, target: Path, part: Part | None, mine: list[OutputShard], tally: Tally) -> tuple[bool, int]:
    """Write what is missing, and finish if nothing is missing any more; (finished, shards left to other parts)."""
    with _resumable(target), open_work(target, part) as work:
        if part is None:
            _remove_unproved(job, work)
        for shard in mine:
            _write_shard(job, work, shard, tally)
        last = work.exclusive()
        work.reload()
        found = [record for shard, origin in job.origins.items() if (record := work.proved(shard, origin, job.kind))]
        if not last or len(found) < len(job.shards):
            return False, len(job.shards) - len(found)
        _remove_unproved(job, work)
        _write_side_files(job, work, found, tally)
        work.commit()
        return True, 0


def _write_shard(job: Job, work: WorkFolder, shard: OutputShard, tally: Tally) -> None:
    origin = job.origins[shard.name]
    if work.proved(shard.name, origin, job.kind):
        tally.reused += shard.size
        tally.moved(job.passes * shard.size)
        return
    work.check()
    path = work.checkpoint / shard.name
    partial = path.with_name(f"{shard.name}.{work.part or 'whole'}.partial")
    partial.unlink(missing_ok=True)
    pieces = shard.pieces(job.checkpoint)
    _check_sources(job, work, pieces, origin, shard.files)
    made: Copied = copy_shard(partial, shard, pieces, job.way(shard), job.checksum, job.reread, tally.moving)
    _check_sources(job, work, shard.pieces(job.checkpoint), origin, shard.files)
    partial.replace(path)
    fsync(work.checkpoint)
    mtime = path.stat().st_mtime_ns
    done = Record(shard.name, shard.size, mtime, origin, job.plan.digest, made.checksum, made.tensors, shard.computed)
    work.add(done)
    tally.cloned += made.cloned
    tally.holes += made.holes
    tally.copied += made.copied
    tally.moved(job.passes * shard.size)


def _check_sources(job: Job, work: WorkFolder, pieces: Sequence[Piece], origin: str, files: Sequence[str]) -> None:
    """Raise InputError when source files are not what they were: before they are copied, so that no pipe is waited for
    in the place of one, and afterwards."""
    if made_from(pieces) != origin:
        own, others = ([file for file in files if os.path.isabs(file) == other] for other in (False, True))
        names = [*([f"{', '.join(own)} in {job.checkpoint.folder}"] if own else []), *others]
        raise InputError(f"{work.target}: not finished: {', '.join(names)} changed while it was copied")


def _remove_unproved(job: Job, work: WorkFolder) -> None:
    """Remove what no record proves: beginnings of files, shards of another plan, side files."""
    for path in list(work.checkpoint.iterdir()):
        if path.name in job.origins and work.proved(path.name, job.origins[path.name], job.kind):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_side_files(job: Job, work: WorkFolder, records: Sequence[Record], tally: Tally) -> None:
    names = {shard.name: shard.refitted for shard in job.shards}
    for file in [manifest(records, job.plan, job.refitted, names), *job.side]:
        path = work.checkpoint / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_sources(job, work, file.pieces, file.origin, [file.name])
        _C.write_file(str(path), list(file.pieces))
        _check_sources(job, work, file.pieces, file.origin, [file.name])
        tally.moved(file.size if file.name != MANIFEST else 0)


@contextmanager
def _resumable(target: Path) -> Iterator[None]:
    """What goes wrong while writing is told with what became of the work."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{target}: not finished: {reason(error)}{_state(target)}") from error
    except InputError as error:
        raise InputError(f"{error}{_state(target)}") from error
    except (KeyboardInterrupt, SystemExit) as error:
        if state := _state(target):
            add_note(error, f"{target}: not finished{state}")
        raise


def _state(target: Path) -> str:
    work = work_path(target)
    shards = list((work / "checkpoint").glob("*.safetensors")) if is_folder(work / "checkpoint") else []
    if not shards or not any(work.glob("manifest*.jsonl")):
        return ""
    size = 0
    with suppress(OSError):
        size = sum(path.stat().st_size for path in shards)
    return f"; {len(shards)} shards ({sized(size)}) stay in {work}: run the same command again to go on"
