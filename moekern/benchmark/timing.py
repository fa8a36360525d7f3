"""How long a call takes: medians with cold caches, and what the machine itself can do in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import moekern._C as _C
from moekern.benchmark.records import Line, machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_scrub: list[Tensor] = []


def scrub() -> Tensor:
    """256 MiB, more than any cache; writing to it makes caches cold."""
    if not _scrub:
        _scrub.append(torch.zeros(64 << 20, device=DEVICE))
    return _scrub[0]


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def once(run: Callable[[], object], *, cold: bool = True) -> float:
    """Seconds of one call."""
    if cold:
        scrub().add_(1)
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def seconds(run: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median of `repeats` calls; the calls to warm up are not counted."""
    for _ in range(warm_up):
        once(run)
    return statistics.median(once(run) for _ in range(repeats))


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median of each, all called in turn: what slows the machine for a while slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            found = once(run, cold=False)
            if i:
                times[name].append(found)
    return {name: statistics.median(found) for name, found in times.items()}


def read_bandwidth(repeats: int) -> float:
    """Bytes a second of a sum over memory: what this machine reads at, not what its datasheet says."""
    return scrub().nbytes / seconds(scrub().sum, repeats)


def facts(threads: int, repeats: int) -> Line:
    """What every line of a kernel benchmark carries."""
    gpu: Line = {"device": torch.cuda.get_device_name()} if DEVICE == "cuda" else {}
    code: Line = {"instruction_set": _C.levels()[-1], "cuda_code": _C.cuda_architectures()}
    read = round(read_bandwidth(repeats) / 1e9, 1)
    return {**machine(), **gpu, **code, "torch": torch.__version__, "threads": threads, "read_gb_s": read}
