"""Fill a decoder layer of Qwen3-30B's shape: weights copied straight into place, against transformers' own conversion.

python -m bench.filling [--dtype bfloat16] [--gigabytes 20] [--rounds 5] [--folder DIR] [--out results.jsonl]

Both fill the same layer of random bytes in turn, in one process with one thread; medians of CPU seconds of the thread
that fills are told, without the first round. With little memory (--gigabytes 8) the conversion goes piece by piece.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import checkpoints
from moekern.architectures import find_layout
from moekern.benchmark.records import append, machine
from moekern.checkpoint.folder import open_checkpoint
from moekern.model import transformers_api
from moekern.model.compute import Compute
from moekern.model.expert_groups import ExpertGroups
from moekern.model.layerwise import open_layerwise

ONE_LAYER = 1300 << 20  # bytes
Stacked = Callable[..., dict[str, torch.Tensor]]


def seconds(folder: Path, compute: Compute, stacked: Stacked) -> float:
    """CPU seconds of the thread that fills the one layer, reading left out."""
    checkpoint, spent = open_checkpoint(folder), 0.0
    own, fill = transformers_api.stacked, ExpertGroups._fill_layer

    def timed(self: ExpertGroups, i: int, tensors: Mapping[str, torch.Tensor]) -> Any:
        nonlocal spent
        start = time.thread_time()
        module = fill(self, i, tensors)
        spent += time.thread_time() - start
        return module

    transformers_api.stacked, ExpertGroups._fill_layer = stacked, timed  # type: ignore[assignment, method-assign]
    if stacked is not own:
        ExpertGroups._copied = lambda self, i: False  # type: ignore[method-assign]
    try:
        with open_layerwise(checkpoint, find_layout(checkpoint), compute) as model:
            for _ in model.visit([0]):
                pass
    finally:
        transformers_api.stacked, ExpertGroups._fill_layer = own, fill  # type: ignore[method-assign]
        ExpertGroups._copied = COPIED  # type: ignore[method-assign]
    return spent


COPIED = ExpertGroups._copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gigabytes", type=float, default=20, help="of memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoint lies")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, Stacked] = {
        "converted": lambda model, tensors, *rest: dict(tensors),
        "copied": transformers_api.stacked,
    }
    compute = Compute(dtype=given.dtype, memory=round(given.gigabytes * (1 << 30)))
    times: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="moekern-filling-", dir=given.folder) as work:
        folder = checkpoints.write(Path(work) / "model", checkpoints.qwen3_moe(ONE_LAYER), seed=1)
        for _ in range(given.rounds + 1):
            for way, stacked in ways.items():
                times[way].append(seconds(folder, compute, stacked))
    found = {way: round(statistics.median(each[1:]), 3) for way, each in times.items()}
    line = {
        **machine(), "what": "filling a layer", "dtype": given.dtype, "gigabytes": given.gigabytes,
        "rounds": given.rounds, "cpu_s": found, "copied_over_converted": round(found["copied"] / found["converted"], 3),
    }  # fmt: skip
    print(json.dumps(line))
    append(given.out, [line])


if __name__ == "__main__":
    main()
