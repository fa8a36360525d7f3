"""What can be known before the first byte is written: whether there is room for the target."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from moekern.errors import InputError
from moekern.files import is_folder, sized, standing, work_path


def check_space(target: Path, nbytes: int, files: int) -> None:
    """Refuse a target that its file system has no room or no inodes for; what an earlier run wrote counts as room."""
    parent = standing(target.parent)
    there = list(_files_in(work_path(target) / "checkpoint"))
    status = os.statvfs(parent)
    free = status.f_bavail * status.f_frsize + sum(512 * found.st_blocks for found in there)
    if nbytes > free:
        raise InputError(f"{target}: needs {sized(nbytes)}, and {parent} has {sized(free)} free")
    inodes = status.f_favail + len(there)
    if status.f_files and files > inodes:
        raise InputError(f"{target}: needs {files} files, and {parent} has room for {inodes} (inodes)")


def _files_in(folder: Path) -> Iterator[os.stat_result]:
    """Of files that are there when they are looked at: another part may be at work, or finish."""
    for root, _, names in os.walk(folder) if is_folder(folder) else ():
        for name in names:
            with suppress(FileNotFoundError):
                yield os.lstat(os.path.join(root, name))
