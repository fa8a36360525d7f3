"""Things that moekern did not write, at the names of its files."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def plant(what: str, path: Path, elsewhere: Path) -> None:
    """A pipe, device (without root a link to one), folder, link to `elsewhere`, or link to nothing."""
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/null") if os.geteuid() else os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(elsewhere if what == "link" else elsewhere.with_name("nowhere"))
