"""File systems for tests that need one of their own: made in a file, mounted through a loop device, always undone."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from moekern.files import fsync

MIB = 1 << 20
FS_IOC_FIEMAP = 0xC020660B
FIEMAP_SYNC, EXTENT_LAST, EXTENT_SHARED = 1, 0x1, 0x2000


@contextmanager
def mounted(kind: str, size: int, *make: str, mount: Sequence[str] = ()) -> Iterator[Path]:
    """A new file system of `size` bytes: tmpfs, or ext4, xfs, btrfs in a sparse file; `make` are options of mkfs.

    Skips the test where that is not allowed or not installed.
    """
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a file system needs root on Linux")
    if kind != "tmpfs" and shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"mkfs.{kind} is not installed")
    folder = Path(tempfile.mkdtemp(prefix="moekern-mount-"))
    point, image = folder / kind, folder / "image"
    point.mkdir()
    try:
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *mount]), "moekern-test", str(point)]
        else:
            with image.open("wb") as file:
                file.truncate(size)
            _quiet([f"mkfs.{kind}", *make, str(image)])
            command = ["mount", "-o", ",".join(["loop", *mount]), str(image), str(point)]
        _quiet(command)
        try:
            yield point
        finally:
            if subprocess.run(["umount", str(point)], capture_output=True).returncode != 0:
                subprocess.run(["umount", "-l", str(point)], check=True)  # the loop device goes with the last user
    finally:
        if not os.path.ismount(point):
            shutil.rmtree(folder)


def _quiet(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{' '.join(command[:3])}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")


def used(folder: Path) -> int:
    """Bytes in use on the file system of a folder, all writes done."""
    fsync(folder)
    subprocess.run(["sync", "-f", str(folder)], check=True)
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def shared_bytes(path: Path) -> int:
    """Bytes of a file that lie in blocks which other files have too, as the file system tells (FIEMAP)."""
    total, start, count = 0, 0, 64
    with path.open("rb") as file:
        while True:
            request = bytearray(struct.pack("=QQIIII", start, (1 << 64) - 1 - start, FIEMAP_SYNC, 0, count, 0))
            request += bytes(56 * count)
            fcntl.ioctl(file.fileno(), FS_IOC_FIEMAP, request)
            mapped = struct.unpack_from("=I", request, 20)[0]
            for i in range(mapped):
                logical, _, length, _, _, flags = struct.unpack_from("=QQQQQI", request, 32 + 56 * i)
                total += length if flags & EXTENT_SHARED else 0
                start = logical + length
                if flags & EXTENT_LAST:
                    return total
            if not mapped:
                return total


def disk_bytes(path: Path) -> int:
    """What a file takes on the disk; its holes take nothing."""
    return path.stat().st_blocks * 512
