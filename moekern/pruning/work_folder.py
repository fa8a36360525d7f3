"""The folder in which an output grows beside its target: who may write there, and what in it is known to be done.

`NAME.moekern/` holds `checkpoint/`, which becomes `NAME` by one rename, and a manifest: JSON lines, one for each shard
that is complete on the disk. A lock on the folder, which ends with the process however that ends, keeps others out.
What other commands keep there is left alone.
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moekern.errors import InputError
from moekern.files import check_new, check_work, fsync, work_path

MANIFESTS = ("manifest.jsonl", "manifest.*-of-*.jsonl")  # of a run without parts; of each part
OWN = (*MANIFESTS, "part-*-of-*.lock")  # the pruner's files, beside `checkpoint`
PATIENCE = 10.0  # seconds that a part waits for a process that is about to finish the output


@dataclass(frozen=True)
class Part:
    """One of `of` processes that share the work, counted from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}-of-{self.of}"

    @classmethod
    def parse(cls, text: str) -> "Part":
        """The part that "2/4" names. Raises InputError."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"--part {text}: expected I/N, I from 1 to N, such as 1/4")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def of_torchrun(cls) -> "Part | None":
        """The part of a process that torchrun has started, if it has started several."""
        if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return None
        return cls(int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"]))


@dataclass(frozen=True)
class Record:
    """A line of the manifest: this shard, of this size, made from this, is complete on the disk."""

    shard: str
    size: int
    mtime_ns: int  # of the shard's file: tells it from one that another plan put in its place
    made_from: str  # sha256 of all that decides the shard's bytes
    plan: str  # sha256 of the plan
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
            status = (self.checkpoint / shard).stat()
        except FileNotFoundError:
            return None
        return record if (status.st_size, status.st_mtime_ns) == (record.size, record.mtime_ns) else None

    def add(self, record: Record) -> None:
        """Append to the manifest, and flush it to the disk."""
        line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
        with self.manifest.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.records[record.shard, record.made_from] = record

    def reload(self) -> None:
        """Read the manifests of all parts again; a line that a killed process left unfinished is no record."""
        self.records = {}
        for path in sorted(found for pattern in MANIFESTS for found in self.folder.glob(pattern)):
            for line in path.read_bytes().split(b"\n")[:-1]:
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
        return _locked(self.handle, fcntl.LOCK_EX)

    def commit(self) -> None:
        """Give the finished checkpoint its name. Raises InputError when something has taken the name meanwhile."""
        for folder in sorted(path for path in self.checkpoint.rglob("*") if path.is_dir()):
            fsync(folder)
        fsync(self.checkpoint)
        check_target(self.target)
        self.checkpoint.rename(self.target)
        fsync(self.target.parent)
        _remove_own(self.folder)


def check_target(target: Path, source: Path | None = None) -> None:
    """Raise InputError when the target exists, lies inside the source or cannot be made. What a process killed just
    after its commit left beside it is removed."""
    if target.name and os.path.lexists(target) and not (work_path(target) / "checkpoint").exists():
        _remove_own(work_path(target))
    check_new(target, folder=True, source=source)
    check_work(target)


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
            work.manifest.touch()
            for folder in (work.folder, target.parent):  # so that a power cut leaves what the manifest proves
                fsync(folder)
            _drop_torn_line(work.manifest)
            work.reload()
            yield work
        finally:
            if part is None and not work.records:
                _remove_own(work.folder)


def _remove_own(work: Path) -> None:
    """Remove what the pruner put into a work folder, and the folder when nothing else is in it."""
    if work.is_symlink():
        return
    shutil.rmtree(work / "checkpoint", ignore_errors=True)
    with suppress(OSError):
        for path in [found for pattern in OWN for found in work.glob(pattern)]:
            path.unlink(missing_ok=True)
        work.rmdir()


@contextmanager
def _locked_folder(target: Path, part: Part | None) -> Iterator[int]:
    folder, until = work_path(target), time.monotonic() + (PATIENCE if part else 0)
    while True:
        folder.mkdir(exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another part has just committed and removed it
            continue
        try:
            if _locked(handle, fcntl.LOCK_SH if part else fcntl.LOCK_EX):
                if _is_still(handle, folder):
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
    for path in folder.glob("part-*.lock"):
        if not path.name.endswith(f"-of-{part.of}.lock"):
            with path.open("ab") as other:
                if not _locked(other.fileno(), fcntl.LOCK_EX):
                    raise InputError(f"--part {part.number}/{part.of}: {path.name[5:-5]} of {target} is being written")
    with (folder / f"part-{part}.lock").open("ab") as file:
        if not _locked(file.fileno(), fcntl.LOCK_EX):
            raise InputError(f"--part {part.number}/{part.of}: another process is writing this part of {target}")
        yield


def _locked(handle: int, how: int) -> bool:
    """Take a lock if it is free. Where the file system has no locks, everybody gets one."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_still(handle: int, folder: Path) -> bool:
    """False when the folder was finished or removed between opening and locking it."""
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


def _drop_torn_line(manifest: Path) -> None:
    data = manifest.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(manifest, data.rfind(b"\n") + 1)


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
