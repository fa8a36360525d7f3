"""Time calibrate in one process and in two:  python -m bench.ranks [--tokens 40000] [--rounds 3] [--out results.jsonl]

On the model that ships, in float32, each process with one thread. Both ways must make the same bytes. Seconds are those
of the calibration, from its first words to its last layer: starting Python and importing torch is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from moekern.benchmark.records import append, machine
from moekern.demo import MODEL, TEXT

WAYS = {"1 process": 1, "2 ranks": 2}


def seconds(processes: int, tokens: int, out: Path) -> float:
    """Of one calibration."""
    starter = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"] if processes > 1 else []
    text = ["--data", f"c={TEXT / 'c' / 'calibration.txt'}", "--data", f"de={TEXT / 'german' / 'calibration.txt'}"]
    sizes = ["--tokens", str(tokens), "--sequence-length", "512", "--chunk", "1", "--dtype", "float32"]
    command = [sys.executable, "-m", *starter, "moekern", "calibrate", str(MODEL), *text, *sizes, "--out", str(out)]
    done = subprocess.run(
        [*command, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    said = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"stage": "calibrating"')]
    return float(said[-1]["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000, help="of text (default: 40000)")
    parser.add_argument("--rounds", type=int, default=3, help="runs a median is taken of, all ways in turn")
    parser.add_argument("--out", type=Path, help="append one JSON line a way to this file")
    options = parser.parse_args()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    made: set[bytes] = set()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for way, processes in WAYS.items():
                out = Path(folder) / f"{number}-{processes}"
                times[way].append(seconds(processes, options.tokens, out))
                made.add(out.read_bytes())
    if len(made) > 1:
        raise SystemExit("one process and two made different statistics")
    one = statistics.median(times["1 process"])
    base = {**machine(), "cores": os.cpu_count(), "tokens": options.tokens, "rounds": options.rounds, "op": "ranks"}
    lines = []
    for way, found in times.items():
        median = statistics.median(found)
        lines.append({**base, "way": way, "seconds": round(median, 2), "times_as_fast": round(one / median, 2)})
        print(f"{way:>10}: {median:.2f} s, {one / median:.2f} times as fast as one")
    append(options.out, lines)


if __name__ == "__main__":
    main()
