"""Time how layers are read from a cold disk:  python -m bench.reading [--size 4] [--folder .] [--out results.jsonl]

Writes a checkpoint of random bytes, 8 layers with 64 tensors each, into a temporary folder, and before every pass drops
it from the page cache. The machine's own speed is the best plain sequential read of the same file in the same run.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import nn

from moekern.benchmark.records import append, machine
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.model.reader import LayerReader, read_tensors

LAYERS, TENSORS, MIB = 8, 64, 1 << 20
Layers = list[list[str]]


def write(folder: Path, size: int) -> Checkpoint:
    """A checkpoint of about `size` bytes in one file, on disk and not in the page cache."""
    each = size // (LAYERS * TENSORS) // MIB * MIB
    header, at = {}, 0
    for layer in range(LAYERS):
        for i in range(TENSORS):
            header[f"layers.{layer}.{i}"] = {"dtype": "U8", "shape": [each], "data_offsets": [at, at + each]}
            at += each
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(at // MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
    (folder / "config.json").write_text("{}")
    return open_checkpoint(folder)


def sequential(path: Path, threads: int, chunk: int, flags: int = 0) -> None:
    """Read a file from its beginning to its end; what each thread reads lands in one chunk of its own."""
    size, file = path.stat().st_size, os.open(path, os.O_RDONLY | flags)
    offsets = iter(range(0, size, chunk))

    def work() -> None:
        with mmap.mmap(-1, chunk) as memory:
            for offset in offsets:  # `next` of a range iterator is atomic
                os.preadv(file, [memory], offset)

    try:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(work) for _ in range(threads)]:
                done.result()
    finally:
        os.close(file)


def layer_reader(checkpoint: Checkpoint, layers: Layers, threads: int) -> None:
    with LayerReader(checkpoint, layers, torch.device("cpu"), threads) as reader:
        for i in range(len(layers)):
            reader.start(i)
            reader.take()
            reader.release(nn.Module())


def one_thread(checkpoint: Checkpoint, layers: Layers) -> None:
    """What moekern did before: memory of its own for every tensor, read one after the other."""
    file = os.open(checkpoint.shards[0].path, os.O_RDONLY)
    for names in layers:
        tensors = []
        for entry in (checkpoint.tensors[name] for name in names):
            tensors.append(torch.empty(entry.nbytes, dtype=torch.uint8))
            view, offset = memoryview(tensors[-1].numpy()), entry.start
            while view:
                got = os.preadv(file, [view], offset)
                view, offset = view[got:], offset + got
    os.close(file)


def safetensors(checkpoint: Checkpoint, layers: Layers) -> None:
    with safe_open(checkpoint.shards[0].path, "pt") as file:
        for names in layers:
            for tensor in [file.get_tensor(name) for name in names]:
                tensor.clone()  # the library maps the file: only this reads it


def own_memory(checkpoint: Checkpoint, layers: Layers) -> None:
    for names in layers:
        read_tensors(checkpoint, names)


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, size: int, rounds: int) -> list[dict[str, object]]:
    checkpoint = write(folder, size)
    path, nbytes = checkpoint.shards[0].path, checkpoint.nbytes
    layers = [[f"layers.{layer}.{i}" for i in range(TENSORS)] for layer in range(LAYERS)]
    ways: dict[str, Callable[[], object]] = {
        "sequential buffered x1": lambda: sequential(path, 1, 4 * MIB),
        "sequential buffered x2": lambda: sequential(path, 2, 4 * MIB),
    }
    for threads, chunk in ((1, 8), (2, 4), (4, 4), (4, 8)):
        name = f"sequential O_DIRECT x{threads}, {chunk} MiB"
        ways[name] = lambda t=threads, c=chunk: sequential(path, t, c * MIB, os.O_DIRECT)  # type: ignore[misc]
    for threads in (1, 2, 4, 8):
        ways[f"layer reader x{threads}"] = lambda t=threads: layer_reader(checkpoint, layers, t)  # type: ignore[misc]
    ways["read_tensors"] = lambda: own_memory(checkpoint, layers)
    ways["one thread, torch.empty"] = lambda: one_thread(checkpoint, layers)
    ways["safe_open"] = lambda: safetensors(checkpoint, layers)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way, read in ways.items():
            drop(path)
            start, cpu = time.perf_counter(), time.process_time()
            read()
            times[way].append((time.perf_counter() - start, time.process_time() - cpu))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    medians = {way: [statistics.median(column) for column in zip(*found, strict=True)] for way, found in times.items()}
    best = min(wall for way, (wall, _) in medians.items() if way.startswith("sequential"))
    base = {**machine(), "cores": os.cpu_count(), "bytes": nbytes, "rounds": rounds}
    return [
        {**base, "op": "read", "way": way, "gb_s": round(nbytes / wall / 1e9, 2), "cpu_s": round(cpu, 2)}
        | {"of_best_sequential": round(best / wall, 3)}
        for way, (wall, cpu) in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=4.0, help="GB of the checkpoint (default: 4)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=5, help="passes a median is taken of, all ways in turn")
    parser.add_argument("--out", type=Path, help="append one JSON line a way to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        lines = measure(Path(folder), int(options.size * 1e9), options.rounds)
    append(options.out, lines)
    table = Table(title=f"{lines[0]['device']}, {lines[0]['cores']} cores, {options.size:g} GB, cold")
    for column in ("way", "gb_s", "cpu_s", "of_best_sequential"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for line in lines:
        table.add_row(*(str(line[column]) for column in ("way", "gb_s", "cpu_s", "of_best_sequential")))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
