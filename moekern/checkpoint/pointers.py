"""Files of git-lfs that stand in for others: a few lines of text that name a file which was not fetched."""

from __future__ import annotations

from pathlib import Path

from moekern.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_CAP = 1024  # bytes that such a file has at most
A_POINTER = "a git-lfs pointer, not the file itself; fetch it (git lfs pull)"


def is_pointer(path: Path) -> bool:
    """False also for what is no regular file, and for what cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > POINTER_CAP:
            return False
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except (OSError, ValueError):
        return False


def check_no_pointer(path: Path) -> None:
    """Raise InputError for the pointer of a file that was not fetched."""
    if is_pointer(path):
        raise InputError(f"{path}: {A_POINTER}")
