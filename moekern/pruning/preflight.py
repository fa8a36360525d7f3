"""What can be known before the first byte is written: whether there is room for the target."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from moekern.errors import InputError
from moekern.files import is_folder, sized, standing, work_path


def check_space(target: Path, nbytes: int, files: int, refitted: Mapping[Path, int] | None = None) -> None:
    """Refuse a target that its file system has no room or no inodes for; what an earlier run wrote counts as room.

    refitted: folders of refitted layers, and the bytes of each, that lie beside it until it is done.
    """
    parent, layers = standing(target.parent), refitted or {}
    folders = (work_path(target) / "checkpoint", *layers)
    there = [found for folder in folders for found in _files_in(folder)]
    status = os.statvfs(parent)
    free = status.f_bavail * status.f_frsize + sum(512 * found.st_blocks for found in there)
    needed = nbytes + sum(layers.values())
    if needed > free:
        until = f", {sized(sum(layers.values()))} of it for refitted layers until it is done" if layers else ""
        raise InputError(f"{target}: needs {sized(needed)}{until}, and {parent} has {sized(free)} free")
    inodes = status.f_favail + len(there)
    if status.f_files and files > inodes:
        raise InputError(f"{target}: needs {files} files, and {parent} has room for {inodes} (inodes)")


def _files_in(folder: Path) -> Iterator[os.stat_result]:
    """Of files that are there when they are looked at: another part may be at work, or finish."""
    for root, _, names in os.walk(folder) if is_folder(folder) else ():
        for name in names:
            with suppress(FileNotFoundError):
                yield os.lstat(os.path.join(root, name))
