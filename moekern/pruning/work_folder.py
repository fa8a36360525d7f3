"""The folder in which an output grows beside its target: who may write there, and what in it is known to be done.

`NAME.moekern/` holds `checkpoint/`, which becomes `NAME` by one rename, and a manifest: JSON lines, one for each shard
that is complete on the disk. A lock on the folder, which ends with the process however that ends, keeps others out.
What other commands keep there is left alone, and so is what stands there and was not written by this program: links
are not followed, pipes not waited for, and nothing is removed whose name or contents are not the pruner's.
"""

import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from moekern.checkpoint.contents import MODEL_CARD
from moekern.errors import InputError
from moekern.files import (
    check_new,
    check_work,
    fsync,
    is_folder,
    is_plain,
    is_still,
    locked,
    open_plain,
    read_plain,
    work_path,
)
from moekern.pruning.pieces import Range
from moekern.pruning.side_files import SideFile
from moekern.publishing.card import RECIPE
from moekern.team import Part

MANIFESTS = ("manifest.jsonl", "manifest.*-of-*.jsonl")  # of a run without parts; of each part
LOCKS = "part-*-of-*.lock"
BEGINNING = b'{"shard": "'  # of every manifest that has a line
PATIENCE = 10.0  # seconds that a part waits for a process that is about to finish the output


@dataclass(frozen=True)
class Record:
    """A line of the manifest: this shard, of this size, made from this, is complete on the disk."""

    shard: str
    size: int
    mtime_ns: int  # of the shard's file: tells it from one that another plan put in its place
    made_from: str  # sha256 of all that decides the shard's bytes
    plan: str | None  # sha256 of the plan
    checksum: str | None  # how `tensors` were made: "xxh3-128", "blake3"
    tensors: Mapping[str, str | None]  # hex; None where the bytes did not pass through memory
    computed: Sequence[str] = ()  # of these tensors the bytes stand in no file of the source


@dataclass
class WorkFolder:
    """A locked work folder. `records` are the lines of all parts' manifests by (shard, made_from)."""

    target: Path
    part: Part | None
    handle: int
    records: dict[tuple[str, str], Record] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return work_path(self.target)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def manifest(self) -> Path:
        return self.folder / (f"manifest.{self.part}.jsonl" if self.part else "manifest.jsonl")

    def proved(self, shard: str, made_from: str, checksum: str | None) -> Record | None:
        """The record of a shard that is complete on the disk; None when it has to be written, for its checksums too."""
        record = self.records.get((shard, made_from))
        if record is None or record.checksum != checksum:
            return None
        try:
            status = (self.checkpoint / shard).lstat()
        except FileNotFoundError:
            return None
        same = (status.st_size, status.st_mtime_ns) == (record.size, record.mtime_ns)
        return record if same and stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else None

    def add(self, record: Record) -> None:
        """Append to the manifest, and flush it to the disk."""
        line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
        with _opened(self.manifest, os.O_WRONLY | os.O_APPEND) as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.records[record.shard, record.made_from] = record

    def reload(self) -> None:
        """Read the manifests of all parts again; a line that a killed process left unfinished is no record."""
        self.records = {}
        for path in _named(self.folder)[0]:
            for line in read_plain(path).split(b"\n")[:-1]:
                record = _parsed(line)
                if record is not None:
                    self.records[record.shard, record.made_from] = record

    def exclusive(self) -> bool:
        """Be the only process in the folder from now on; False when another part is at work or waits for its turn.

        A part gives up its shared lock first, when its records are on the disk: of several that come here at once, the
        last finds all of them.
        """
        if self.part is None:
            return True
        with suppress(OSError):
            fcntl.flock(self.handle, fcntl.LOCK_UN)
        return locked(self.handle, fcntl.LOCK_EX)

    def check(self) -> None:
        """Raise InputError when folder or checkpoint are no longer those that were opened, but a link, say."""
        if not is_still(self.handle, self.folder) or not is_folder(self.checkpoint):
            raise InputError(f"{self.target}: not finished: {self.checkpoint} was removed or replaced meanwhile")

    def commit(self) -> None:
        """Give the finished checkpoint its name. Raises InputError when something has taken the name meanwhile."""
        self.check()
        for folder in sorted(path for path in self.checkpoint.rglob("*") if path.is_dir()):
            fsync(folder)
        fsync(self.checkpoint)
        check_target(self.target)
        self.checkpoint.rename(self.target)
        fsync(self.target.parent)
        _remove_own(self.folder)


def check_target(target: Path, source: Path | None = None) -> None:
    """Raise InputError when the target exists, lies inside the source or cannot be made, or something in its work
    folder is in the way. What a process killed just after its commit left beside it is removed."""
    clean_up(target)
    check_new(target, folder=True, source=source)
    check_work(target)
    _check_own(work_path(target))


def clean_up(target: Path) -> None:
    """Remove what a process killed just after its commit left beside the target."""
    if target.name and os.path.lexists(target) and not os.path.lexists(work_path(target) / "checkpoint"):
        _remove_own(work_path(target))


def is_made(target: Path, sizes: Mapping[str, int], side: Sequence[SideFile]) -> bool:
    """Whether a finished target is what the same plan makes of the same source: all shards are there and have these
    sizes, and the files beside them, which name plan and source, their bytes; but for the card, which people change,
    and the recipe, in which a model may be named in several ways."""
    try:
        if not is_folder(target) or any((target / shard).lstat().st_size != size for shard, size in sizes.items()):
            return False
        for file in side:
            path = target / file.name
            if file.name in (MODEL_CARD, RECIPE):
                continue
            if not is_plain(path) or path.lstat().st_size != file.size:
                return False
            if not _has_literals(path, file.pieces):
                return False
    except (OSError, InputError):
        return False
    return True


def _has_literals(path: Path, pieces: Sequence[bytes | Range]) -> bool:
    """Whether a file of the right size has the bytes of its pieces that are no copies where they belong."""
    found, at = (read_plain(path) if any(isinstance(piece, bytes) for piece in pieces) else b""), 0
    for piece in pieces:
        length = len(piece) if isinstance(piece, bytes) else piece[-1]
        if isinstance(piece, bytes) and found[at : at + length] != piece:
            return False
        at += length
    return True


@contextmanager
def open_work(target: Path, part: Part | None) -> Iterator[WorkFolder]:
    """The target's work folder, new or as an earlier run left it, locked for this process, or for this part of them.

    On leaving, what is there without any complete shard is removed. Raises InputError when another process is at work.
    """
    with _locked_folder(target, part) as handle:
        work = WorkFolder(target, part, handle)
        try:
            check_target(target)
            work.checkpoint.mkdir(exist_ok=True)
            os.close(open_plain(work.manifest, os.O_RDWR | os.O_CREAT))
            for folder in (work.folder, target.parent):  # so that a power cut leaves what the manifest proves
                fsync(folder)
            _drop_torn_line(work.manifest)
            work.reload()
            yield work
        finally:
            if part is None and not work.records:
                _remove_own(work.folder)


def _check_own(work: Path) -> None:
    """Raise InputError when something in a work folder that the pruner would write to or remove is not the pruner's."""
    checkpoint = work / "checkpoint"
    if os.path.lexists(checkpoint) and not is_folder(checkpoint):
        raise InputError(f"{checkpoint}: is no folder, and the shards are written in one there; move it away")
    filled = bool(os.listdir(checkpoint)) if is_folder(checkpoint) else False
    manifests, locks = _named(work)  # afterwards: another part makes its manifest before its first shard
    for path in (*manifests, *locks):
        if not _is_own(path):
            raise InputError(f"{path}: has the name of a file of moekern's, which did not write it; move it away")
    if filled and not manifests:
        raise InputError(f"{checkpoint}: no manifest beside it says that moekern wrote what is in it; move it away")


def _named(work: Path) -> tuple[list[Path], list[Path]]:
    """What has the name of a manifest, and of a part's lock; links to nothing too, which glob may pass over."""
    names = sorted(os.listdir(work)) if is_folder(work) else []
    manifests = [work / name for name in names if any(fnmatchcase(name, pattern) for pattern in MANIFESTS)]
    return manifests, [work / name for name in names if fnmatchcase(name, LOCKS)]


def _is_own(path: Path) -> bool:
    """Whether the pruner wrote a manifest or a lock: it begins as its lines do; locks are empty. What is gone is."""
    try:
        if not is_plain(path):
            return True
        with _opened(path, os.O_RDONLY) as file:
            found = file.read(len(BEGINNING))
            if os.fstat(file.fileno()).st_nlink > 1:  # it has a name elsewhere
                return False
    except FileNotFoundError:  # another part has removed it
        return True
    except (InputError, OSError):
        return False
    return BEGINNING.startswith(found) and (found == b"" or path.suffix != ".lock")


def _remove_own(work: Path) -> None:
    """Remove what the pruner put into a work folder, and the folder when nothing else is in it."""
    if not is_folder(work):
        return
    manifests, locks = ([path for path in found if _is_own(path)] for found in _named(work))
    checkpoint = work / "checkpoint"
    if manifests and is_folder(checkpoint):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with suppress(OSError):
        for path in (*manifests, *locks):
            path.unlink(missing_ok=True)
        work.rmdir()


@contextmanager
def _locked_folder(target: Path, part: Part | None) -> Iterator[int]:
    folder, until = work_path(target), time.monotonic() + (PATIENCE if part else 0)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another part has just committed and removed it
            continue
        try:
            if locked(handle, fcntl.LOCK_SH if part else fcntl.LOCK_EX):
                if is_still(handle, folder):  # not finished or removed since it was opened
                    with _locked_part(target, part):
                        yield handle
                    return
            elif time.monotonic() >= until:
                raise InputError(f"{target}: another process is writing it, in {folder}; wait for it or stop it")
        finally:
            os.close(handle)
        time.sleep(0.05)


@contextmanager
def _locked_part(target: Path, part: Part | None) -> Iterator[None]:
    """Refuse a second process with the same part, and parts of another number of processes."""
    if part is None:
        yield
        return
    folder = work_path(target)
    for path in _named(folder)[1]:
        if not path.name.endswith(f"-of-{part.of}.lock") and is_plain(path):
            with _opened(path, os.O_RDONLY) as other:
                if not locked(other.fileno()):
                    raise InputError(f"--part {part.number}/{part.of}: {path.name[5:-5]} of {target} is being written")
    with _opened(folder / f"part-{part}.lock", os.O_RDWR | os.O_CREAT) as file:
        if not locked(file.fileno()):
            raise InputError(f"--part {part.number}/{part.of}: another process is writing this part of {target}")
        yield


def _opened(path: Path, flags: int) -> IO[bytes]:
    return os.fdopen(open_plain(path, flags), "wb" if flags & (os.O_WRONLY | os.O_RDWR) else "rb")


def _drop_torn_line(manifest: Path) -> None:
    data = read_plain(manifest)
    if not data.endswith(b"\n"):
        with _opened(manifest, os.O_RDWR) as file:
            file.truncate(data.rfind(b"\n") + 1)


def _parsed(line: bytes) -> Record | None:
    try:
        found: Any = json.loads(line)
        record = Record(**found)
    except (ValueError, TypeError, RecursionError):
        return None
    good = isinstance(record.shard, str) and isinstance(record.made_from, str) and isinstance(record.tensors, dict)
    good = good and all(value is None or isinstance(value, str) for value in record.tensors.values())
    good = good and isinstance(record.computed, list | tuple) and all(isinstance(name, str) for name in record.computed)
    return record if good else None
