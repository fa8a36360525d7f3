"""Time evaluate with one plan and with eight:  python -m bench.evaluating [--rounds 3] [--layers] [--out results.jsonl]

Where computing dominates: the model that ships, --tokens of its text, in float32. Where reading does: --size bytes of
layers in the shape of Qwen3-30B-A3B, in bfloat16, which are dropped from the page cache before every run, and one
sequence of --few tokens. Plans keep half of the experts, each others. Told are seconds, those of the CPU (all threads),
and bytes that the disk was asked for; ratios are medians of those within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from bench import checkpoints
from bench.streaming import cool
from moekern.architectures import find_layout
from moekern.benchmark.records import append, machine
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.data.text import Text
from moekern.demo import MODEL, TEXT
from moekern.evaluation.evaluate import evaluate
from moekern.model.compute import Compute
from moekern.plan.document import LayerPlan, Plan

PLANS = (1, 8)
MOST = {"computing": 9.0, "reading": 3.0}  # times as dear eight plans may be
Measured = Mapping[str, float]


def plans_of(folder: Path, number: int) -> dict[str, Plan]:
    """Each keeps half of the experts, drawn with a seed of its own."""
    layers = find_layout(open_checkpoint(folder)).layers
    found = {}
    for seed in range(number):
        random = np.random.default_rng(seed)
        keep = {
            key: sorted(random.choice(each.num_experts, each.num_experts // 2, replace=False).tolist())
            for key, each in layers.items()
        }
        found[str(seed)] = Plan({key: LayerPlan(tuple(own)) for key, own in keep.items()})
    return found


def measured(folder: Path, data: TokenData, compute: Compute, number: int, layers: bool) -> Measured:
    """One run."""
    plans, before, read = plans_of(folder, number), time.process_time(), read_bytes()
    start = time.perf_counter()
    evaluate(folder, data, plans, compute, layers=layers)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - before,
        "read_bytes": read_bytes() - read,
    }


def read_bytes() -> int:
    """That this process has had storage read so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def lines_of(kind: str, rounds: int, run: Callable[[int], Measured]) -> list[dict[str, object]]:
    """A line for each number of plans, medians of rounds in turn."""
    found: dict[int, list[Measured]] = {number: [] for number in PLANS}
    for _ in range(rounds):
        for number in PLANS:
            found[number].append(run(number))
    lines = []
    for number, each in found.items():
        line: dict[str, object] = {"op": "evaluate", "dominated_by": kind, "plans": number, "rounds": rounds}
        for name in each[0]:
            line[name] = round(statistics.median(one[name] for one in each), 2)
            ratios = [one[name] / first[name] for one, first in zip(each, found[PLANS[0]], strict=True) if first[name]]
            line[f"{name}_ratio"] = round(statistics.median(ratios), 2) if ratios else None
        lines.append(line)
        print(json.dumps(line))
    ratio = lines[-1]["cpu_seconds_ratio" if kind == "computing" else "seconds_ratio"]
    print(f"{kind}: {PLANS[-1]} plans take {ratio} times what {PLANS[0]} takes (at most {MOST[kind]:g})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of text, where computing dominates")
    parser.add_argument("--few", type=int, default=32, help="tokens, where reading does")
    parser.add_argument("--size", type=float, default=2.6, help="GB of layers, where reading does")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where these lie meanwhile")
    parser.add_argument("--rounds", type=int, default=3, help="runs a median is taken of")
    parser.add_argument("--layers", action="store_true", help="with figures of layers")
    parser.add_argument("--out", type=Path, help="append one JSON line a number of plans to this file")
    given = parser.parse_args()
    text = Text((f"d={TEXT / 'english' / 'evaluation.txt'}",), tokens=given.tokens, sequence_length=512)
    data, float32 = text.read(open_checkpoint(MODEL)), Compute("cpu", "float32")
    measured(MODEL, data, float32, 1, given.layers)  # not counted: the first run imports
    lines = lines_of("computing", given.rounds, lambda n: measured(MODEL, data, float32, n, given.layers))
    with tempfile.TemporaryDirectory(dir=given.folder) as work:
        blueprint = checkpoints.qwen3_moe(int(given.size * 1e9))
        folder = checkpoints.write(Path(work) / "model", blueprint, seed=0)
        checkpoints.numbers(folder)
        ids = torch.from_numpy(np.random.default_rng(0).integers(0, 8192, (1, given.few)))
        few = TokenData((Batch("d", ids),), {})

        def cold(number: int) -> Measured:
            cool(folder)
            return measured(folder, few, Compute("cpu", "bfloat16"), number, given.layers)

        lines += lines_of("reading", given.rounds, cold)
    base = {**machine(), "threads": torch.get_num_threads(), "tokens": given.tokens, "few": given.few}
    base |= {"size": given.size, "layers": given.layers}
    append(given.out, [{**base, **line} for line in lines])


if __name__ == "__main__":
    main()
