"""Text that is far larger than the memory: the commands calibrate and evaluate, with one plan, in processes that may
hold so many bytes and no more (RLIMIT_DATA), and what `estimate` says of both beforehand.

python -m bench.wide [--tokens 2M] [--layers 2] [--gigabytes 8] [--only calibrate] [--folder DIR] [--out results.jsonl]

The model has the hidden size of the largest ones (7168, bfloat16: 14 KB of hidden states a token, 28.7 GB in all), and
little else, so that what waits between layers is nearly all that there is; nothing is stubbed. Files in --folder take
up to 51 GB with one plan, and as much again where the disk has room to write down how far a run is. Prints a JSON line
for each command: seconds, those of the CPU, peak resident memory, bytes that the disk was asked for, and notes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import checkpoints
from moekern.benchmark.records import Line, append, machine

LENGTH = "512"  # tokens of a sequence
FIGURES = ("seconds", "memory", "disk")
BLOCK = 512  # bytes, in which the system counts what a process has had the disk read and write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="2M")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=8, help="of memory, 10^9 bytes each")
    parser.add_argument("--only", choices=("calibrate", "evaluate"), help="this command alone, without an estimate")
    parser.add_argument("--folder", type=Path, help="where the checkpoint and what does not fit into memory lie")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moekern-wide-", dir=given.folder) as work:
        for words in commands(Path(work), given.layers, given.tokens, given.gigabytes):
            if given.only in (None, words[0]):
                line: Line = {"command": words[0], "tokens": given.tokens, "layers": given.layers}
                line |= {"gigabytes": given.gigabytes, **run(words, round(given.gigabytes * 1e9)), **machine()}
                print(json.dumps(line), flush=True)
                append(given.out, [line])


def commands(work: Path, layers: int, tokens: str, gigabytes: float) -> Sequence[Sequence[str]]:
    """What is run, on a checkpoint, a text and a plan that are written here."""
    blueprint = checkpoints.wide(layers)
    folder = checkpoints.write(work / "model", blueprint, seed=0)
    checkpoints.numbers(folder)
    number = round(float(tokens.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(tokens[-1], 1))
    np.save(work / "text.npy", np.random.default_rng(0).integers(0, blueprint.config["vocab_size"], number, np.int32))
    (work / "half.json").write_text(json.dumps(checkpoints.half_plan(blueprint)))
    shared = ["--tokens", tokens, "--sequence-length", LENGTH, "--dtype", "bfloat16"]
    shared += ["--memory", f"{gigabytes}GB", "--json"]
    text = ["--data", f"text={work / 'text.npy'}", "--spill", str(work), *shared]
    return (
        ["estimate", str(folder), "--out", str(work), *shared],
        ["calibrate", str(folder), "--out", str(work / "statistics.safetensors"), *text],
        ["evaluate", str(folder), str(work / "half.json"), *text],
    )


def run(words: Sequence[str], nbytes: int) -> Line:
    """One command in a process whose data are limited; progress goes on to standard error. Raises
    CalledProcessError where it fails."""
    start, notes = time.perf_counter(), []
    with tempfile.TemporaryFile("w+") as document, subprocess.Popen(
        [sys.executable, "-m", "moekern", *words], stdout=document, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes)),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            print(f"{time.perf_counter() - start:.0f} s: {line}", end="", file=sys.stderr, flush=True)
            if line.startswith('{"note"'):
                notes.append(json.loads(line)["note"])
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        document.seek(0)
        told = document.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(words))
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "system_seconds": round(used.ru_stime, 1),
        "peak": used.ru_maxrss << 10,
        "read_bytes": used.ru_inblock * BLOCK,
        "written_bytes": used.ru_oublock * BLOCK,
        "notes": notes,
        **estimated(json.loads(told).get("stages", {})),
    }


def estimated(stages: Mapping[str, Any]) -> Line:
    """Of what `estimate` tells: seconds, bytes of memory, and bytes in a file, of the commands that are run here."""
    return {
        name: {kind: {part["name"]: round(part["value"]) for part in stage[kind]["parts"]} for kind in FIGURES}
        for name, stage in stages.items()
        if name in ("calibrate", "evaluate")
    }


if __name__ == "__main__":
    main()
