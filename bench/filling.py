"""Fill decoder layers of Qwen3-30B's shape: weights copied straight into place, against transformers' own conversion;
and the next layer while one computes, against between the two.

python -m bench.filling [--dtype bfloat16] [--gigabytes 20] [--rounds 5] [--folder DIR] [--out results.jsonl]
python -m bench.filling --overlap 2048 [--threads 1] [--layers 4] [the same]

All ways fill the same layers of random bytes in turn, in one process; medians are told, without the first round: CPU
seconds of the thread that fills one layer, or, with --overlap, seconds of the clock of a pass of so many tokens over
several layers, whose hidden states must be the same bits. With little memory (--gigabytes 8) the conversion goes piece
by piece.
"""

from __future__ import annotations

import argparse
import hashlib
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
from moekern.data.batches import Batch
from moekern.model import layerwise, transformers_api
from moekern.model.compute import Compute
from moekern.model.expert_groups import ExpertGroups, Maker
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.walk import Pass

ONE_LAYER = 1300 << 20  # bytes
Stacked = Callable[..., dict[str, torch.Tensor]]


def seconds(folder: Path, compute: Compute, stacked: Stacked) -> float:
    """CPU seconds of the thread that fills the one layer, reading left out."""
    checkpoint, spent = open_checkpoint(folder), 0.0
    own, maker = transformers_api.stacked, ExpertGroups.maker

    def timed(self: ExpertGroups, number: int) -> Maker:
        make = maker(self, number)

        def made(tensors: Mapping[str, torch.Tensor]) -> Any:
            nonlocal spent
            start = time.thread_time()
            module = make(tensors)
            spent += time.thread_time() - start
            return module

        return made

    transformers_api.stacked, ExpertGroups.maker = stacked, timed  # type: ignore[assignment, method-assign]
    if stacked is not own:
        ExpertGroups._copied = lambda self, i: False  # type: ignore[method-assign]
    try:
        with open_layerwise(checkpoint, find_layout(checkpoint), compute) as model:
            for _ in model.visit([0]):
                pass
    finally:
        transformers_api.stacked, ExpertGroups.maker = own, maker  # type: ignore[method-assign]
        ExpertGroups._copied = COPIED  # type: ignore[method-assign]
    return spent


COPIED = ExpertGroups._copied


class Plain(Pass[Batch]):
    """A forward pass; `digest` is of what it has made."""

    def __init__(self, layerwise: LayerwiseModel) -> None:
        self.layerwise, self.digest = layerwise, hashlib.sha256()

    def forward(self, task: Batch) -> None:
        self.digest.update(self.layerwise.compute(task).logits.float().numpy().tobytes())


def overlapped(folder: Path, compute: Compute, tokens: int, ahead: bool) -> tuple[float, str, str]:
    """Seconds of a pass, what bounded it, and the digest of its logits."""
    checkpoint, own = open_checkpoint(folder), layerwise.worth_it
    ids = torch.arange(tokens).remainder(1000).view(1, -1)
    layerwise.worth_it = lambda *of: ahead
    try:
        with open_layerwise(checkpoint, find_layout(checkpoint), compute) as model:
            assert (model.takes.ahead > 0) == ahead, model.takes.described
            start, run = time.perf_counter(), Plain(model)
            model.run([Batch("text", ids)], run)
            return time.perf_counter() - start, model.filler.spent.described, run.digest.hexdigest()
    finally:
        layerwise.worth_it = own


def overlap(folder: Path, compute: Compute, given: argparse.Namespace) -> dict[str, Any]:
    """Medians of both ways, and their ratio."""
    ways: dict[str, list[float]] = {"between layers": [], "overlapped": []}
    digests, bound = set(), {}
    for _ in range(given.rounds + 1):
        for way, times in ways.items():
            found, bound[way], digest = overlapped(folder, compute, given.overlap, way == "overlapped")
            times.append(found)
            digests.add(digest)
    if len(digests) > 1:
        raise SystemExit("both ways must make the same bits")
    seconds = {way: round(statistics.median(times[1:]), 3) for way, times in ways.items()}
    ratio = statistics.median(b / a for a, b in list(zip(*ways.values(), strict=True))[1:])
    return {
        "what": "a pass over layers", "tokens": given.overlap, "threads": given.threads, "layers": given.layers,
        "wall_s": seconds, "bound": bound, "overlapped_over_between": round(ratio, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gigabytes", type=float, default=20, help="of memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--overlap", type=int, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4, help="of a pass")
    parser.add_argument("--folder", type=Path, help="where the checkpoint lies")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    ways: dict[str, Stacked] = {
        "converted": lambda model, tensors, *rest: dict(tensors),
        "copied": transformers_api.stacked,
    }
    compute = Compute(dtype=given.dtype, memory=round(given.gigabytes * (1 << 30)))
    times: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="moekern-filling-", dir=given.folder) as work:
        layers = given.layers if given.overlap else 1
        folder = checkpoints.write(Path(work) / "model", checkpoints.qwen3_moe(ONE_LAYER * layers), seed=1)
        if given.overlap:
            checkpoints.numbers(folder)
            line = machine() | {"dtype": given.dtype, "rounds": given.rounds} | overlap(folder, compute, given)
            print(json.dumps(line))
            append(given.out, [line])
            return
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
