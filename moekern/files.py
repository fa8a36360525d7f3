"""Files that appear whole or not at all, by one process at a time; names and places that are refused beforehand."""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moekern.errors import InputError

CHUNK, WORK, LOCK = 1 << 20, ".moekern", "work.lock"  # work folders: TARGET.moekern; in one: a process is at work


@contextmanager
def told(path: str | Path) -> Iterator[None]:
    """What the system refuses meanwhile is told in one line that names `path`, and the file where it is another."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{path}: not finished: {reason(error)}", kind="system") from error


def reason(error: OSError) -> str:
    """What the system says, with the file where it names one."""
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text


@contextmanager
def replacing(
    path: str | Path, *, new: bool = False, keep: bool = False, position: Path | None = None
) -> Iterator[Path]:
    """A new empty file beside `path`. When the block ends well it is fsynced and renamed to `path`, else removed.

    Folders that are missing above it are made. It is locked: a second process that is to write `path` meanwhile is
    refused. With `new`, `path` must not exist at the end either. With `keep`, a whole file that cannot get its name
    stays, for `name_left`. `position` is a file that says how far an unfinished one is: such a one stays while that is
    there, and what a stopped process left is taken up as it is. Raises InputError for what cannot get its name, where
    nothing can be made in the folder, and where `path` is there and no file.
    """
    target = Path(path)
    check_place(target, "")
    if target.is_dir() and not new:
        raise InputError(f"{target}: is a folder; name a file")
    if not new:
        is_plain(target)
    temporary, kept = temporary_path(target), False
    make_parents(target)
    with told(target):
        handle = claimed(temporary, target, again=position is not None)
    try:
        with told(target):
            yield temporary
        kept = keep  # until it has its name
        try:
            _give_name(handle, temporary, target, new)
        except InputError as error:
            if not (keep and is_still(handle, temporary)):
                raise
            again = f"it is whole in {temporary}: run the same command again to go on"
            raise InputError(f"{error}; {again}", error.kind) from error
    finally:
        if not kept and not (position is not None and os.path.lexists(position)):
            _remove_claimed(handle, temporary)
        os.close(handle)


def _give_name(handle: int, temporary: Path, target: Path, new: bool) -> None:
    with told(target):
        os.fsync(handle)
        if not is_still(handle, temporary):
            raise InputError(f"{target}: not finished: {temporary} was removed or replaced while it was written")
        if new:
            check_new(target)
        temporary.replace(target)
        fsync(target.parent)


def name_left(path: Path, is_whole: Callable[[Path], bool]) -> bool:
    """Give a new file that `replacing` has left its name, where it is there, nobody writes it, and it `is_whole`."""
    temporary = temporary_path(path)
    handle = _taken_up(temporary)
    if handle is None:
        return False
    with os.fdopen(handle):
        if whole := is_whole(temporary):
            _give_name(handle, temporary, path, new=True)
        return whole


def write_bytes(path: str | Path, data: bytes, *, new: bool = False) -> bool:
    """Write `data` beside `path`, fsync, rename; with `new` as `replacing` has it, but for a file that holds these very
    bytes already: False, and it is left as it is."""
    if new and is_written(Path(path), data):
        return False
    with replacing(path, new=new) as temporary:
        temporary.write_bytes(data)
    return True


def is_written(path: Path, data: bytes) -> bool:
    """Whether a file itself, no link to one, holds these very bytes."""
    try:
        return is_plain(path) and path.lstat().st_size == len(data) and read_plain(path) == data
    except (InputError, OSError):
        return False


def check_new(path: str | Path, flag: str = "--out", *, folder: bool = False, source: Path | None = None) -> None:
    """Raise InputError unless a new file, or folder, can be made at `path`, which `flag` gave. A link to nothing is
    something too, and so is what stands where a file is written before it has its name. Nor may it lie in `source`, or
    in any model's folder, of which it would be a part. To be called before anything is measured or written."""
    target, what = Path(path), "folder" if folder else "file"
    check_name(target, flag, what)
    if os.path.lexists(target):
        raise InputError(f"{flag} {target}: exists already; name a new {what} or remove it")
    if source is not None and target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{flag} {target}: lies inside the source {source}; name a {what} elsewhere")
    for place in (standing(target.parent).resolve() / "x").parents:
        if os.path.isfile(place / "config.json") and any(place.glob("model*.safetensors*")):
            raise InputError(f"{flag} {target}: would become a part of the model in {place}; name a place outside it")
    check_place(target, flag)
    if not folder:
        is_plain(temporary_path(target))


def check_document(path: str | Path, flag: str = "--out") -> None:
    """As check_new for a document that is made in moments: a file that is not empty may be there, since `write_bytes`
    leaves one that holds the same and refuses another."""
    target = Path(path)
    if target.is_symlink() or not target.is_file() or not target.stat().st_size:
        check_new(target, flag)
    else:
        check_place(target, flag)


def check_name(target: Path, flag: str = "--out", what: str = "file or folder") -> None:
    """Raise InputError when a path ends in no name."""
    if target.name in ("", ".."):
        raise InputError(f"{flag} {target}: names no new {what}")


def check_place(path: str | Path, flag: str = "--out") -> None:
    """Raise InputError unless a file can be made at `path`, with the folders that it lacks, and the name can be written
    and is short enough for the names beside it."""
    target = Path(path)
    name = f"{flag} {target}".strip()
    try:
        str(target).encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}: the name is not UTF-8; name another") from None
    parent = standing(target.parent)
    if not os.path.isdir(parent):
        raise InputError(f"{name}: {parent} is no folder; name another place")
    longest = os.pathconf(parent, "PC_NAME_MAX") - len(temporary_path(Path("x")).name) + 1
    if len(os.fsencode(target.name)) > longest:
        raise InputError(f"{name}: the name is longer than {longest} bytes, and names beside it are longer still")
    if os.statvfs(parent).f_flag & os.ST_RDONLY:  # first, since nobody has permission there
        raise InputError(f"{name}: {parent} is on a file system that is mounted read-only")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{name}: no permission to write in {parent}")


def standing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there: on its file system missing ones would be made."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def make_parents(target: Path) -> None:
    """Make the folders that a target lies in and that are missing. Raises InputError where the system refuses."""
    with told(target):
        target.parent.mkdir(parents=True, exist_ok=True)


def temporary_path(target: Path) -> Path:
    """The file in which `target` is written before it has its name."""
    return target.with_name(f".{target.name}.moekern.tmp")


def work_path(target: Path) -> Path:
    """The folder beside a target for all that is not yet done of it, or that it was made from: `run`'s statistics and
    plan, rounds, states, the checkpoint that `prune` writes. Each removes its own, and the folder when it is empty."""
    return target.with_name(f"{target.name}{WORK}")


def state_path(target: Path) -> Path:
    """The folder in it that says how far a run is, for the next one to go on from."""
    return work_path(target) / "state"


def check_work(target: Path) -> None:
    """Raise InputError when something else stands at the work folder's name: it is not followed, and not removed."""
    check_name(target)
    work = work_path(target)
    if os.path.lexists(work) and not is_folder(work):
        raise InputError(f"{work}: is no folder, and what is not done yet of {target} is kept there; move it away")


@contextmanager
def working(target: Path) -> Iterator[Path]:
    """The work folder of a target, where no other `run` or `iterate` is; removed at the end when nothing is in it."""
    work = work_path(target)
    check_work(target)
    make_parents(target)
    with told(work):
        work.mkdir(exist_ok=True)
        if is_plain(work / LOCK) and (work / LOCK).lstat().st_size:
            raise InputError(f"{work / LOCK}: is no lock of moekern's, which are empty; move it away")
        handle = claimed(work / LOCK, target)
    try:
        yield work
    finally:
        _remove_claimed(handle, work / LOCK)
        os.close(handle)
        with suppress(OSError):
            work.rmdir()


@contextmanager
def scratch(folder: str | Path, kind: str) -> Iterator[Path]:
    """A new folder `moekern-KIND-...` in `folder`, removed at the end; those that killed processes left go first."""
    for path in Path(folder).glob(f"moekern-{kind}-????????"):
        with suppress(OSError), _folder(path) as handle:
            if os.fstat(handle).st_uid == os.getuid():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not even tried where there are no locks
                shutil.rmtree(path)
    while True:
        path = Path(folder) / f"moekern-{kind}-{secrets.token_hex(4)}"
        with told(path):
            path.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # until it is locked, another process may take it for one that was left
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            if locked(handle) and is_still(handle, path):
                break
            os.close(handle)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)


def claimed(path: Path, target: Path, *, again: bool = False) -> int:
    """A new file that is locked for this process, open for writing, for what becomes `target`; what a killed process
    left at its name is removed, or taken (`again`). Raises InputError when another process holds it, or it is no file
    of this program."""
    while True:
        if again and (left := _taken_up(path)) is not None:
            return left
        with suppress(FileExistsError):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            if locked(handle) and is_still(handle, path):
                return handle
            os.close(handle)  # another took it for one that was left
            time.sleep(0.01)
            continue
        if is_plain(path) and not remove_left(path):
            raise InputError(f"{target}: another process is writing it, in {path}; wait for it or stop it")


def _taken_up(path: Path, flags: int = os.O_RDWR) -> int | None:
    """The file of a process that was killed, locked; None where there is none."""
    with suppress(FileNotFoundError):
        if is_plain(path):
            handle = open_plain(path, flags)
            if locked(handle) and is_still(handle, path):
                return handle
            os.close(handle)
    return None


def remove_left(path: Path) -> bool:
    """Remove the file of a process that was killed; False when a process still holds it."""
    handle = _taken_up(path, os.O_RDONLY)
    if handle is None:
        return not os.path.lexists(path)
    with os.fdopen(handle):
        _remove_claimed(handle, path)
    return True


def _remove_claimed(handle: int, path: Path) -> None:
    with suppress(OSError):
        if is_still(handle, path):
            path.unlink()


def locked(handle: int, how: int = fcntl.LOCK_EX) -> bool:
    """Take a lock if it is free. Where the file system has no locks, everybody gets one."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def is_still(handle: int, path: Path) -> bool:
    """False when what was opened no longer has this name."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), path.lstat())
    return False


def is_folder(path: Path) -> bool:
    """A folder itself, no link to one."""
    with suppress(OSError):
        return stat.S_ISDIR(path.lstat().st_mode)
    return False


def is_plain(path: Path) -> bool:
    """Whether a file is there. Raises InputError for what this program never writes: a link, a pipe, a folder, ..."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: a link, pipe or other thing that moekern did not write stands there; move it away")
    return True


def open_plain(path: Path, flags: int) -> int:
    """Open a file of this program's: without following a link or waiting at a pipe; to write, only one that has no
    second name elsewhere. Raises InputError for anything else."""
    is_plain(path)
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise InputError(f"{path}: was replaced by a link, a pipe or a folder; move it away") from error
        raise
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or (flags & (os.O_WRONLY | os.O_RDWR) and found.st_nlink > 1):
        os.close(handle)
        raise InputError(f"{path}: is a pipe, or has a second name elsewhere (a hard link); move it away")
    return handle


def read_plain(path: Path) -> bytes:
    """The bytes of a file of this program's, opened as open_plain does."""
    with open(open_plain(path, os.O_RDONLY), "rb") as file:
        return file.read()


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def reserve(file: int, size: int) -> None:
    """Take the blocks of a file of `size` bytes at once, where the file system can. Raises OSError without room."""
    os.truncate(file, size)
    try:
        if size:
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, f"{error.strerror}; {size} bytes are needed") from error


def sha256(path: str | Path) -> str:
    """Hex digest of the file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def sized(nbytes: float) -> str:
    """Bytes with a binary unit: 1536 -> "1.5 KiB"."""
    units, power = ("B", "KiB", "MiB", "GiB", "TiB"), 0
    while nbytes >= 1024 and power + 1 < len(units):
        nbytes, power = nbytes / 1024, power + 1
    return f"{nbytes:.{min(power, 1)}f} {units[power]}"
