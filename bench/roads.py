"""One way of making a pruned checkpoint, in a process of its own, so that its memory can be told from the others'.

python -m bench.roads ROAD SOURCE PLAN OUT RAW prints one JSON line: seconds of the work with its fsyncs, without the
imports, and MiB of peak resident memory before and after it. RAW is a folder with as many bytes as the result.
python -m bench.roads command ARGUMENTS... runs the moekern command line, imports included.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

CHUNK, BUFFERS = 8 << 20, 4
EXPERT = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts\.)(\d+)(\..+)")
ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")

Work = Callable[[], object]


@dataclass(frozen=True)
class Job:
    source: Path
    plan: Path
    out: Path
    raw: Path

    @cached_property
    def keep(self) -> dict[str, list[int]]:
        """Layer -> kept experts."""
        return {key: layer["keep"] for key, layer in json.loads(self.plan.read_text())["layers"].items()}

    @property
    def shards(self) -> list[Path]:
        return sorted(self.source.glob("*.safetensors"))


def cp(job: Job) -> Work:
    """The raw copy that the others are compared with."""

    def work() -> None:
        subprocess.run(["cp", "-r", "--reflink=never", str(job.raw), str(job.out)], check=True)
        fsync_all(job.out)

    return work


def raw_ring(job: Job) -> Work:
    """A plain copy as an engine would do it: a thread reads, a thread writes, and dirty pages leave as they come."""
    write_range = ctypes.CDLL(None, use_errno=True).sync_file_range
    write_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def reader(source: int, full: queue.Queue[memoryview], empty: queue.Queue[bytearray]) -> None:
        position, got = 0, -1
        while got:
            buffer = empty.get()
            got = os.preadv(source, [buffer], position)
            position += got
            full.put(memoryview(buffer)[:got])

    def copy(source: int, target: int) -> None:
        full: queue.Queue[memoryview] = queue.Queue()
        empty: queue.Queue[bytearray] = queue.Queue()
        for _ in range(BUFFERS):
            empty.put(bytearray(CHUNK))
        threading.Thread(target=reader, args=(source, full, empty)).start()
        position = 0
        while piece := full.get():
            done = 0
            while done < len(piece):
                done += os.pwrite(target, piece[done:], position + done)
            write_range(target, position, len(piece), 2)  # SYNC_FILE_RANGE_WRITE: starts, does not wait
            position += len(piece)
            buffer = piece.obj
            assert isinstance(buffer, bytearray)
            empty.put(buffer)
        os.fsync(target)

    def work() -> None:
        job.out.mkdir()
        for path in sorted(job.raw.iterdir()):
            with path.open("rb", buffering=0) as source, (job.out / path.name).open("xb", buffering=0) as target:
                copy(source.fileno(), target.fileno())
        fsync_all(job.out)

    return work


def moekern(job: Job, copy: str | None) -> Work:
    from moekern.plan.document import Plan
    from moekern.pruning.prune import prune

    options: dict[str, Any] = {} if copy is None else {"copy": copy}
    return lambda: prune(job.source, Plan.load(job.plan), job.out, **options)


def load_file(job: Job) -> Work:
    """The usual script: load each shard whole, filter and rename, save it."""
    from safetensors.torch import load_file, save_file

    def work() -> None:
        job.out.mkdir()
        for path in job.shards:
            tensors = {}
            for name, tensor in load_file(path).items():
                if new := renamed(name, job.keep):
                    tensors[new] = tensor[job.keep[router[1]]] if (router := ROUTER.fullmatch(name)) else tensor
            save_file(tensors, job.out / path.name, metadata={"format": "pt"})
        finish(job)

    return work


def safe_open(job: Job) -> Work:
    """The careful script: read the kept tensors only."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    def work() -> None:
        job.out.mkdir()
        for path in job.shards:
            tensors = {}
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  not a dict
                    if new := renamed(name, job.keep):
                        tensor = shard.get_tensor(name)
                        tensors[new] = tensor[job.keep[router[1]]] if (router := ROUTER.fullmatch(name)) else tensor
            save_file(tensors, job.out / path.name, metadata={"format": "pt"})
        finish(job)

    return work


def compressed_tensors(job: Job) -> Work:
    """The shard converter of compressed-tensors >= 0.20, told to keep the plan's experts instead of its own choice."""
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from compressed_tensors.entrypoints.convert.converters.magnitude_expert_pruner import MagnitudeExpertPruner

    def work() -> None:
        pruner = MagnitudeExpertPruner.from_pretrained(job.source, r"mlp\.gate\.weight$", r"mlp\.experts\.\d+\.", 0.5)
        pruner.retained_experts = {f"model.layers.{key}.mlp.gate.weight": keep for key, keep in job.keep.items()}
        convert_checkpoint(job.source, job.out, pruner, device="cpu")
        fsync_all(job.out)

    return work


def renamed(name: str, keep: dict[str, list[int]]) -> str | None:
    """The key in the result; None for a dropped expert's."""
    match = EXPERT.fullmatch(name)
    if match is None:
        return name
    kept = keep[match[2]]
    return f"{match[1]}{kept.index(int(match[3]))}{match[4]}" if int(match[3]) in kept else None


def finish(job: Job) -> None:
    """Index and config of the result, and everything on the disk."""
    from safetensors import safe_open

    weight_map = {}
    for path in job.out.glob("*.safetensors"):
        with safe_open(path, framework="np") as shard:
            weight_map.update(dict.fromkeys(shard.keys(), path.name))
    index = {"metadata": {}, "weight_map": weight_map}
    (job.out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((job.source / "config.json").read_text())
    config["num_experts"] = len(next(iter(job.keep.values())))
    (job.out / "config.json").write_text(json.dumps(config))
    fsync_all(job.out)


def fsync_all(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def command(arguments: list[str]) -> Work:
    def work() -> None:
        from moekern.cli.app import main

        sys.argv = ["moekern", *arguments]
        with redirect_stdout(io.StringIO()):
            main()

    return work


PLAIN: dict[str, Callable[[Job], Work]] = {
    "cp": cp,
    "raw ring": raw_ring,
    "load_file + save_file": load_file,
    "safe_open + save_file": safe_open,
    "compressed-tensors": compressed_tensors,
}


def prepared(road: str, arguments: list[str]) -> Work:
    """The road's imports done, its work not yet."""
    if road == "command":
        return command(arguments)
    job = Job(*map(Path, arguments))
    if road in PLAIN:
        return PLAIN[road](job)
    return moekern(job, road.partition(" ")[2] or None)


def peak_mib() -> float:
    """Peak resident memory of this process so far: VmHWM, which unlike ru_maxrss knows nothing of the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def main() -> None:
    work = prepared(sys.argv[1], sys.argv[2:])
    before, start, code = peak_mib(), time.perf_counter(), 0
    try:
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": round(seconds, 4), "rss_before_mib": before, "rss_mib": peak_mib()}))
    sys.exit(code)


if __name__ == "__main__":
    main()
