"""Time inspect and prune, on the largest open checkpoints and against other ways of copying.

python -m bench.streaming scale [MODEL ...] [--layers N]   true shapes of 671B and 1T models, data made of holes
python -m bench.streaming dense [--size 4] [--rounds 5]    random bytes: plain copies, moekern, safetensors scripts

Each measurement is a process of its own. Checkpoints are written below --folder, which chooses the file system, and
removed afterwards. `dense` needs twice --size there, starts every road with a cold page cache, counts fsync in every
road, and stops when two roads made different tensors. compressed-tensors takes part where it can be imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import checkpoints
from moekern.benchmark.records import append, machine
from moekern.checkpoint.folder import open_checkpoint
from moekern.plan.document import Plan
from moekern.pruning.prune import prune

Line = dict[str, Any]
COPIES = ("stream", "kernel", "auto", "reflink")
PLAN = "plan.json"


def child(road: str, *arguments: str | Path) -> Line:
    """What bench.roads reports, and the seconds from start to end of its process."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "bench.roads", road, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{road} {arguments[0]}: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}")
    line: Line = json.loads(done.stdout.splitlines()[-1])
    return {**line, "wall": round(wall, 3)}


@contextmanager
def workspace(folder: Path | None) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="moekern-bench-", dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def scale(name: str, layers: int, folder: Path | None) -> Iterator[Line]:
    """inspect and prune of a sparse checkpoint, by the command line."""
    blueprint = checkpoints.MODELS[name](layers)
    base = {**facts(), "model": name, "layers": layers, "tensors": len(blueprint.tensors), "bytes": blueprint.nbytes}
    with workspace(folder) as place:
        source, plan, out = checkpoints.write(place / "model", blueprint), place / PLAN, place / "pruned"
        plan.write_text(json.dumps(checkpoints.half_plan(blueprint)))
        yield {**base, "what": "inspect", "on_disk": on_disk(source), **child("command", "inspect", source)}
        try:
            done = child("command", "prune", source, plan, "--out", out)
        except SystemExit as refusal:
            print(refusal, file=sys.stderr)
            return
        size, blocks = open_checkpoint(out).nbytes, on_disk(out)
        yield {**base, "what": "prune", "bytes": size, "on_disk": blocks, **done}


def on_disk(folder: Path) -> int:
    """Bytes that the files occupy, without their holes."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def dense(size: int, rounds: int, folder: Path | None) -> list[Line]:
    """Every road, in `rounds` interleaved rounds; each round begins with another road."""
    blueprint = checkpoints.qwen3_moe(size)
    with workspace(folder) as place:
        source, plan, raw, out = place / "model", place / PLAN, place / "raw", place / "out"
        checkpoints.write(source, blueprint, seed=0)
        plan.write_text(json.dumps(checkpoints.half_plan(blueprint)))
        prune(source, Plan.load(plan), raw)
        for path in raw.iterdir():
            if path.suffix != ".safetensors":
                path.unlink()
        roads = available(place)
        times: dict[str, list[Line]] = {road: [] for road in roads}
        expected: str | None = None
        for turn in range(rounds):
            for road in (*roads[turn % len(roads) :], *roads[: turn % len(roads)]):
                cool(source, raw)
                times[road].append(child(road, source, plan, out, raw))
                if road not in ("cp", "raw ring"):
                    made = open_checkpoint(out).fingerprint
                    expected = expected or made
                    if made != expected:
                        raise SystemExit(f"{road} made other tensors than the road before it")
                shutil.rmtree(out)
                print(f"round {turn + 1}: {road} {times[road][-1]['seconds']:.2f} s", file=sys.stderr)
        return summary(times, sum(path.stat().st_size for path in raw.iterdir()), {**facts(), **where(place)})


def available(place: Path) -> list[str]:
    """The roads that this machine, this file system and this version of moekern have."""
    roads = ["cp", "raw ring"]
    if "copy" in inspect.signature(prune).parameters:
        roads += [f"moekern {copy}" for copy in COPIES if copy != "reflink" or shares_blocks(place / PLAN)]
    else:
        roads.append("moekern")
    roads += ["load_file + save_file", "safe_open + save_file"]
    if importlib.util.find_spec("compressed_tensors"):
        roads.append("compressed-tensors")
    return roads


def shares_blocks(path: Path) -> bool:
    clone = path.with_name("clone")
    done = subprocess.run(["cp", "--reflink=always", path, clone], stderr=subprocess.DEVNULL, check=False)
    clone.unlink(missing_ok=True)
    return done.returncode == 0


def cool(*folders: Path) -> None:
    """Everything written out, and the folders' files out of the page cache; needs no privilege."""
    os.sync()
    for folder in folders:
        for path in folder.iterdir():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def summary(times: dict[str, list[Line]], size: int, base: Line) -> list[Line]:
    """Medians; ratios are medians of the ratios within a round. memory: the largest of all rounds."""
    seconds = {road: [line["seconds"] for line in lines] for road, lines in times.items()}

    def over(road: str, other: str) -> float:
        pairs = zip(seconds[road], seconds[other], strict=True)
        return float(round(statistics.median(theirs / ours for ours, theirs in pairs), 3))

    lines = []
    for road, runs in times.items():
        t = statistics.median(seconds[road])
        line = {**base, "road": road, "bytes": size, "rounds": len(runs), "seconds": round(t, 3)}
        line |= {"gb_s": round(size / t / 1e9, 3), "s_per_100_gb": round(t * 1e11 / size, 1)}
        line |= {"of_cp": over(road, "cp"), "over_save_file": over(road, "load_file + save_file")}
        line |= {key: max(run[key] for run in runs) for key in ("rss_before_mib", "rss_mib")}
        lines.append(line)
    return lines


def facts() -> Line:
    return {**machine(), "cores": os.cpu_count(), "kernel": platform.release()}


def where(folder: Path) -> Line:
    """The file system's type, as findmnt says."""
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["findmnt", "-n", "-o", "FSTYPE", "-T", str(folder)]
        return {"file_system": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}
    return {}


def show(title: str, lines: Sequence[Line], columns: Sequence[str]) -> None:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for line in lines:
        table.add_row(*(f"{line[c] / 1e9:.3f} GB" if c in ("bytes", "on_disk") else str(line[c]) for c in columns))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    large = commands.add_parser("scale", help="inspect and prune at true scale")
    large.add_argument("model", nargs="*", help=f"{', '.join(checkpoints.MODELS)} (default: all)")
    large.add_argument("--layers", type=int, default=61, help="decoder layers (default: all 61)")
    small = commands.add_parser("dense", help="roads compared on random bytes")
    small.add_argument("--size", type=float, default=4, help="GB of the checkpoint (default 4)")
    small.add_argument("--rounds", type=int, default=5, help="interleaved rounds that medians are taken of")
    for command in (large, small):
        command.add_argument("--out", type=Path, help="append one JSON line a measurement to this file")
        command.add_argument(
            "--folder", type=Path, help="where checkpoints are written (default: the temporary folder)"
        )
    options = parser.parse_args()
    run: Callable[[argparse.Namespace], None] = run_scale if options.command == "scale" else run_dense
    run(options)


def run_scale(options: argparse.Namespace) -> None:
    lines: list[Line] = []
    names = options.model or list(checkpoints.MODELS)
    for name in names:
        if name not in checkpoints.MODELS:
            raise SystemExit(f"{name}: expected one of {', '.join(checkpoints.MODELS)}")
        if not checkpoints.half_plan(checkpoints.MODELS[name](options.layers))["layers"]:
            raise SystemExit(f"--layers {options.layers}: {name} has no layer with experts there; give more")
    for name in names:
        for line in scale(name, options.layers, options.folder):
            append(options.out, [line])
            lines.append(line)
    columns = ("model", "what", "tensors", "bytes", "on_disk", "wall", "rss_mib")
    show(f"{lines[0]['device']}, {lines[0]['cores']} cores; checkpoints made of holes", lines, columns)


def run_dense(options: argparse.Namespace) -> None:
    lines = dense(int(options.size * 1e9), options.rounds, options.folder)
    append(options.out, lines)
    columns = (
        "road", "seconds", "gb_s", "s_per_100_gb", "of_cp", "over_save_file", "rss_before_mib", "rss_mib",
    )  # fmt: skip
    first = lines[0]
    title = (
        f"{first['bytes'] / 1e9:.2f} GB written, {first.get('file_system', '')}, {first['device']}, cold, with fsync"
    )
    show(f"{title}, medians of {first['rounds']}", lines, columns)


if __name__ == "__main__":
    main()
