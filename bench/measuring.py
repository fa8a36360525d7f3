"""What measuring adds: `calibrate` against the same streamed forward pass without it, in turn, in one process.

python -m bench.measuring [--model MODEL] [--tokens 16384] [--rounds 5] [--tier TIER ...] [--out results.jsonl]

Both compute the same chunks of the same text up to the last layer with experts. A round runs both; medians of rounds
and their ratio are told, in seconds of the clock and, since other work on the machine changes these, of the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moekern.architectures import find_layout
from moekern.benchmark.records import append, machine
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.data.text import Text
from moekern.demo import MODEL, text_sources
from moekern.model.compute import Compute
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.suspended import Pass

TARGET = 1.05  # of the routed tier


class Plain(Pass[Batch]):
    """The model's own forward pass, up to the last layer with experts."""

    def __init__(self, layerwise: LayerwiseModel) -> None:
        self.layerwise, self.stop_after = layerwise, max(layerwise.moe_keys)

    def forward(self, task: Batch) -> None:
        self.layerwise.compute(task)


def plain(checkpoint: Checkpoint, data: TokenData, compute: Compute) -> None:
    """The streamed pass alone."""
    with open_layerwise(checkpoint, find_layout(checkpoint), compute) as layerwise:
        layerwise.run(list(data.by_chunk().batches), Plain(layerwise))


def measured(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Medians of seconds of the clock and of the CPU; the first round warms up and is not counted."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for round in range(rounds + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if round:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: (median(found[name], 0), median(found[name], 1)) for name in runs}


def median(found: Sequence[tuple[float, float]], column: int) -> float:
    return statistics.median(each[column] for each in found)


def line(model: Path, tokens: int, rounds: int, tiers: Sequence[str], dtype: str) -> dict[str, Any]:
    """One comparison."""
    checkpoint, compute = open_checkpoint(model), Compute(dtype=dtype)
    data = Text(text_sources("calibration"), tokens=tokens, sequence_length=128).read(checkpoint)
    runs = {
        "plain": lambda: plain(checkpoint, data, compute),
        "measured": lambda: calibrate(checkpoint, data, compute, tiers=tiers),
    }
    times = measured(runs, rounds)
    wall, cpu = (times["measured"][i] / times["plain"][i] for i in (0, 1))
    seconds = {
        f"{name}_{kind}_s": round(each[i], 3) for name, each in times.items() for i, kind in enumerate(("wall", "cpu"))
    }
    return {
        **machine(), "what": "calibrate", "model": model.name, "tokens": sum(data.tokens.values()), "dtype": dtype,
        "tiers": ["routed", *tiers], "rounds": rounds, **seconds,
        "over_plain": round(wall, 3), "over_plain_cpu": round(cpu, 3), "target": TARGET,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tier", action="append", default=[])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = line(args.model, args.tokens, args.rounds, args.tier, args.dtype)
    print(json.dumps(found))
    append(args.out, [found])


if __name__ == "__main__":
    main()
