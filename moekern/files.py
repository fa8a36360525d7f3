"""Files that appear whole or not at all."""

import fcntl
import glob
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moekern.errors import InputError

CHUNK = 1 << 20


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new empty file beside `path`. When the block ends well it is fsynced and renamed to `path`, else removed.

    Raises InputError when nothing can be made in the folder or `path` is itself a folder.
    """
    target = Path(path)
    check_place(target, "")
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file")
    _remove_stale(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
        fsync(temporary)
        temporary.replace(target)
        fsync(target.parent)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def _remove_stale(target: Path) -> None:
    """Remove what processes that were killed have left of this file: temporaries that nobody has locked."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` beside `path`, fsync, rename."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def check_new(path: str | Path, flag: str = "--out", *, folder: bool = False, source: Path | None = None) -> None:
    """Raise InputError unless a new file, or folder, can be made at `path`, which `flag` gave. A link to nothing is
    something too. With `source`: unless `path` lies outside it. To be called before anything is measured or written."""
    target, what = Path(path), "folder" if folder else "file"
    if os.path.lexists(target):
        raise InputError(f"{flag} {target}: exists already; name a new {what} or remove it")
    if target.name in ("", ".."):
        raise InputError(f"{flag} {target}: names no new {what}")
    if source is not None and target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{flag} {target}: lies inside the source {source}; name a {what} elsewhere")
    check_place(target, flag)


def check_place(path: str | Path, flag: str = "--out") -> None:
    """Raise InputError unless the folder of `path` is there and can be written to."""
    target = Path(path)
    parent, name = target.parent, f"{flag} {target}".strip()
    if not os.path.isdir(parent):
        raise InputError(f"{name}: the folder {parent} does not exist; make it first")
    if os.statvfs(parent).f_flag & os.ST_RDONLY:  # first, since nobody has permission there
        raise InputError(f"{name}: {parent} is on a file system that is mounted read-only")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{name}: no permission to write in {parent}")


def work_path(target: Path) -> Path:
    """The folder beside a target in which all that is not yet done of it, or that it was made from, is kept: `run`'s
    statistics and plan, `iterate`'s rounds, the checkpoint that `prune` writes. Each removes what is its own, and the
    folder when nothing is left in it."""
    return target.with_name(f"{target.name}.moekern")


def check_work(target: Path) -> None:
    """Raise InputError when something else stands at the work folder's name: it is not followed, and not removed."""
    work = work_path(target)
    if os.path.lexists(work) and (work.is_symlink() or not work.is_dir()):
        raise InputError(f"{work}: is no folder, and what is not done yet of {target} is kept there; move it away")


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """A folder for what the context makes; where that fails, it does not stay behind empty."""
    path.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: str | Path) -> str:
    """Hex digest of the file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()
