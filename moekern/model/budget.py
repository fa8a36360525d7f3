"""How much memory layers may take: what a person allows, or what the machine and the groups around the process have
free."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moekern.errors import InputError
from moekern.files import sized
from moekern.model.compute import Compute

SPARE = 16  # of what is free, one part in so many is left to others
UNLIMITED = 1 << 60  # bytes; version 1 of cgroups writes a number beyond it for no limit
HIERARCHIES = {  # file system -> files of a limit, file of what is taken, beginning of the names in memory.stat
    "cgroup2": (("memory.max", "memory.high"), "memory.current", ""),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
}


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that may be taken beyond what the process holds already."""

    host: int
    gpu: int | None = None  # None: layers are not computed on a CUDA device

    @property
    def described(self) -> str:
        """For people."""
        gpu = "" if self.gpu is None else f" and {sized(self.gpu)} of the GPU's"
        return f"up to {sized(self.host)} of memory{gpu}"


def least(budgets: Sequence[Budget]) -> Budget:
    """What each of several processes has."""
    gpus = [budget.gpu for budget in budgets if budget.gpu is not None]
    return Budget(min(budget.host for budget in budgets), min(gpus, default=None))


def budget_of(compute: Compute) -> Budget:
    """What `compute` allows, less what the process holds; where it allows nothing, what is free but for a sixteenth.

    Free is what the machine has. What the control group (of either version), one around it, and limits of the process
    (RLIMIT_AS, RLIMIT_DATA) leave is the most in either case. `gpu_memory` caps torch's allocator from here on; the
    context that CUDA itself keeps on a device, some hundred MB, comes on top. Raises InputError for less memory than
    the process has before it reads a weight, and for `gpu_memory` on another device than a GPU. Processes on one node
    share what is allowed, or free, evenly.
    """
    held, sharers = resident(), compute.team.local_size
    if compute.memory is not None and compute.memory // sharers <= held:
        raise InputError(
            f"--memory {sized(compute.memory)}: the process has {sized(held)} before it reads a weight; allow more"
        )
    host = _most(available() // sharers) if compute.memory is None else compute.memory // sharers - held
    groups = (left // sharers for left in groups_left())
    return Budget(min([host, *map(_most, (*groups, *limits_left()))]), _gpu(compute))


def _most(free: int) -> int:
    return free - free // SPARE


def _gpu(compute: Compute) -> int | None:
    place = compute.place
    if place.type != "cuda":
        if compute.gpu_memory is not None:
            raise InputError(f"--gpu-memory: layers are computed on {place}, which is no GPU; leave it out")
        return None
    free, total = torch.cuda.mem_get_info(place)
    free += torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
    if compute.gpu_memory is None:
        return _most(free)
    left = compute.gpu_memory - torch.cuda.memory_allocated(place)
    if left <= 0:
        raise InputError(f"--gpu-memory {sized(compute.gpu_memory)}: more than that is taken already; allow more")
    torch.cuda.set_per_process_memory_fraction(min(1.0, compute.gpu_memory / total), place)
    return min(left, free)


def resident() -> int:
    """Bytes of memory that the process holds; 0 where the system does not say."""
    return _statm(1)


def limits_left() -> Iterator[int]:
    """Bytes until the process meets a limit of its own, on its address space or on its data, where it has one."""
    for kind, column in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield max(0, limit - _statm(column))


def _statm(column: int) -> int:
    """Bytes, of the numbers of pages in /proc/self/statm: 0 the address space, 1 what is resident, 5 data."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[column]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def available() -> int:
    """Bytes that the machine can give without swapping; all that it has where it does not say."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def groups_left(root: Path = Path("/")) -> Iterator[int]:
    """Bytes left in every control group around the process that has a limit; pages of files count as free.

    `root` is where /proc and /sys are.
    """
    for kind, folder, top in _groups(root):
        limits, taken, prefix = HIERARCHIES[kind]
        for group in (folder, *folder.parents):
            bounds = [bound for name in limits if (bound := _number(group / name)) is not None]
            used, stat = _number(group / taken), _numbers(group / "memory.stat")
            if min(bounds, default=UNLIMITED) < UNLIMITED and used is not None:
                files = sum(stat.get(f"{prefix}{name}", 0) for name in ("inactive_file", "active_file"))
                yield max(0, min(bounds) - max(0, used - files))
            if group == top:
                break


def _groups(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Of each hierarchy that counts memory: its file system, the process's group and the outermost one that is seen."""
    own = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            own["cgroup" if controllers else "cgroup2"] = path
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, rest = line.partition(" - ")
        kind, _, options = (*rest.split(" ", 2), "", "")[:3]
        if kind not in own or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        mounted, place = mount.split()[3:5]
        top = root / place.lstrip("/")
        inner = os.path.relpath(own[kind], mounted)
        folder = top if inner.startswith("..") else top / inner
        yield kind, folder if folder.is_dir() else top, top


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """A file's one number; None for "max" and for a file that is not there."""
    text = "".join(_lines(path)[:1])
    return int(text) if text.isdecimal() else None


def _numbers(path: Path) -> Mapping[str, int]:
    pairs = (line.split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
