"""The folder in which it is written down how far a run is: locked, known by its files' names, removed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moekern import files
from moekern.errors import InputError
from moekern.model.position import OWN

POSITION = "position.json"


@contextmanager
def locked(folder: Path, tell: Callable[[str], None]) -> Iterator[bool]:
    """Whether the folder is there, made if need be, this user's own, and no other process's."""
    handle = None
    for path in (folder.parent, folder) if _in_work_folder(folder) else (folder,):
        if os.path.lexists(path) and not files.is_folder(path):
            raise InputError(f"{path}: is no folder, and it is written there how far a run is; move it away")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if os.fstat(handle).st_uid != os.getuid():
            raise InputError(f"{folder}: belongs to another user; name another place (--spill)")
        free, why = files.locked(handle), "another process is at work there"
    except OSError as error:
        free, why = False, files.reason(error)
    if not free:
        tell(f"{folder}: not usable ({why}); if this run is stopped, it begins anew")
    try:
        yield free
    finally:
        if handle is not None:
            os.close(handle)


def check_own(folder: Path) -> None:
    """Raise InputError for a link, a pipe or a folder by the name of a file of this program's."""
    for name in sorted(os.listdir(folder)):
        if OWN.fullmatch(name):
            files.is_plain(folder / name)


def remove_files(folder: Path) -> None:
    """Remove what this program has written into a folder."""
    with suppress(OSError):
        names = [name for name in os.listdir(folder) if OWN.fullmatch(name)]
        for name in sorted(names, key=lambda name: name != POSITION):  # without it the others are nothing
            with suppress(OSError, InputError):
                if files.is_plain(folder / name):
                    (folder / name).unlink()


def removed(folder: Path) -> None:
    """Remove what this program has written into a folder, and it, and the work folder around it, where nothing is left
    there. Nothing happens where it is not there, or a link."""
    if files.is_folder(folder) and not (_in_work_folder(folder) and folder.parent.is_symlink()):
        remove_files(folder)
        with suppress(OSError):
            folder.rmdir()
            if _in_work_folder(folder):
                folder.parent.rmdir()


def _in_work_folder(folder: Path) -> bool:
    """The folder around it is moekern's too, and no place that a person has named."""
    return folder.parent.suffix == files.WORK


def clean_up(target: Path) -> None:
    """Remove what a process left that was killed between giving `target` its name and removing this itself."""
    folder = files.state_path(target)
    with suppress(InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
        if files.is_plain(target) and files.is_folder(folder) and files.is_plain(folder / POSITION):
            found = json.loads(files.read_plain(folder / POSITION))
            if found["stage"] == found["stages"][-1] and found["layer"] == found["of"]:
                removed(folder)
