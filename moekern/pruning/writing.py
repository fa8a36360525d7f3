"""Writing a checkpoint: shards that are known piece by piece, side files, and the name at the end."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moekern._C as _C
from moekern.checkpoint.folder import MANIFEST, Checkpoint
from moekern.errors import InputError, add_note
from moekern.files import check_new, fsync, is_folder, reason, sized, standing, work_path
from moekern.pruning.copying import KINDS, Checksum, Copy, Way, copy_shard, space_needed, way_of, ways
from moekern.pruning.cuts import check_tables
from moekern.pruning.manifest import manifest
from moekern.pruning.pieces import Piece, made_from
from moekern.pruning.preflight import check_space
from moekern.pruning.shards import OutputShard
from moekern.pruning.side_files import SideFile
from moekern.pruning.work_folder import Record, WorkFolder, is_made, open_work
from moekern.team import Part

Progress = Callable[[int, int], None]  # bytes written, bytes to write


@dataclass(frozen=True)
class Job:
    """All that decides the bytes of the output, and how they come there."""

    checkpoint: Checkpoint
    plan: str | None  # sha256 of the plan; None where none is known
    shards: Sequence[OutputShard]
    origins: Mapping[str, str]  # shard -> sha256 of all that decides its bytes
    side: Sequence[SideFile]
    told: Mapping[str, Mapping[str, Any]]  # shard -> what else its line of the manifest says
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


def job_of(
    checkpoint: Checkpoint,
    plan: str | None,
    shards: Sequence[OutputShard],
    side: Sequence[SideFile],
    told: Mapping[str, Mapping[str, Any]],
    target: Path,
    copy: Copy,
    checksum: Checksum,
    *,
    reread: bool = False,
) -> Job:
    """Raises InputError for tables that cannot be renumbered, and for a way of copying that cannot be taken."""
    check_tables(checkpoint, (tensor for shard in shards for tensor in shard.tensors))
    origins = {shard.name: made_from(shard.pieces(checkpoint)) for shard in shards}
    known_ways = ways(checkpoint, {name for shard in shards for name in shard.files}, standing(target.parent), copy)
    again = reread or checksum == "blake3"
    return Job(checkpoint, plan, shards, origins, side, told, known_ways, checksum, again)


def check_out(job: Job, target: Path, mine: Sequence[OutputShard], *, again: bool) -> None:
    """Raise InputError where there is no room for the target, or something else stands there `again`."""
    if not again:
        needed = sum(space_needed(job.checkpoint, shard, job.known_ways) for shard in mine)
        check_space(target, needed + sum(file.size for file in job.side), len(mine) + len(job.side) + 8)
    elif not job.is_made(target):
        check_new(target, folder=True)


def written(
    job: Job, target: Path, part: Part | None, mine: Sequence[OutputShard], tally: Tally
) -> tuple[bool, int, bool]:
    """What _write tells; and whether other parts have finished while this one waited for them."""
    try:
        return *_write(job, target, part, mine, tally), False
    except InputError:
        if part is None or not job.is_made(target):
            raise
        return True, 0, True


def _write(job: Job, target: Path, part: Part | None, mine: Sequence[OutputShard], tally: Tally) -> tuple[bool, int]:
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
    made = copy_shard(partial, shard, pieces, job.way(shard), job.checksum, job.reread, tally.moving)
    _check_sources(job, work, shard.pieces(job.checkpoint), origin, shard.files)
    partial.replace(path)
    fsync(work.checkpoint)
    mtime = path.stat().st_mtime_ns
    done = Record(shard.name, shard.size, mtime, origin, job.plan, made.checksum, made.tensors, shard.computed)
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
    for file in [manifest(records, job.plan, job.told), *job.side]:
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
