"""What `plan` takes on the statistics of a large model: seconds and peak memory of each criterion of the routed tier.

python -m bench.planning [--layers 61] [--experts 384] [--domains 1] [--criteria reap hope] [--folder DIR] [--out FILE]

The statistics are those of random routing of 4,096 tokens, with its experts in another order in each layer. Every
criterion plans in a process of its own, the whole command; a JSON line each.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moekern import kernels
from moekern.benchmark.inputs import Layer, normal, routing
from moekern.benchmark.records import append, machine
from moekern.criteria import CRITERIA
from moekern.router import Router
from moekern.statistics.file import MadeLayer, MadeLayers, Statistics
from moekern.statistics.folding import Folding
from moekern.statistics.header import Source, make_header
from moekern.statistics.layer import LayerStatistics

TOKENS, TOP_K, HIDDEN = 4096, 8, 16
PLANS = """
import sys
from pathlib import Path
from moekern.cli.app import main
try:
    main()
finally:
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], file=sys.stderr)
"""  # of this process alone; ru_maxrss would start at the parent's


def measured(experts: int, seed: int) -> LayerStatistics:
    """The sums of one layer and domain."""
    fold, half = Folding(), TOKENS // 2
    for segment in (0, 1):
        given = routing(half, Layer(experts, TOP_K, HIDDEN, HIDDEN, "softmax"), "cpu", 2 * seed + segment)
        sums = LayerStatistics.zeros(experts)
        kernels.router_stats(given.logits, given.topk_idx, given.topk_weight, None, sums.views(kernels.RouterSums))
        y, residual = (normal(n, HIDDEN, device="cpu", seed=n) for n in (half * TOP_K, half))
        kernels.combine_and_measure(
            y, given.topk_weight, given.topk_idx, given.order, given.offsets, None, sums.views(kernels.ExpertSums),
            residual=residual,
        )  # fmt: skip
        fold.add(segment, sums)
    return fold.total()


@dataclass(frozen=True, eq=False)
class PermutedLayer(MadeLayer):
    """One of them: the experts of `parts` in an order that its key decides."""

    parts: Mapping[str, LayerStatistics]

    def __getitem__(self, domain: str) -> LayerStatistics:
        sums = self.parts[domain]
        return sums.permuted(torch.randperm(sums.num_experts, generator=torch.Generator().manual_seed(int(self.key))))


class PermutedLayers(MadeLayers):
    """One layer's sums over and over."""

    def __init__(self, parts: Mapping[str, LayerStatistics], layers: int) -> None:
        self.parts = parts
        self.sizes = {str(i): {name: sums.to("meta") for name, sums in parts.items()} for i in range(layers)}

    def __getitem__(self, key: str) -> PermutedLayer:
        return PermutedLayer(key, list(self.parts), self.parts)


def write(path: Path, layers: int, experts: int, domains: int) -> Path:
    """A statistics file of random routing."""
    parts = {f"d{i}": measured(experts, i) for i in range(domains)}
    header = make_header(
        Source("f" * 64, "deepseek_v3", "softmax", Router(experts, TOP_K)),
        tokens=dict.fromkeys(parts, TOKENS), data={}, backend="native", versions={},
    )  # fmt: skip
    Statistics(header, PermutedLayers(parts, layers)).save(path)
    return path


def lines(path: Path, criteria: list[str]) -> Iterator[dict[str, object]]:
    """Seconds, those of the processor, and the peak of each criterion."""
    for name in criteria:
        out = path.with_name("plan.json")
        options = ["--criterion", name, "--keep", "0.5", "--out", str(out)]
        start, used = time.perf_counter(), cpu()
        done = subprocess.run(
            [sys.executable, "-c", PLANS, "plan", str(path), *options], capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(done.stderr)
        out.unlink()
        found = {"criterion": name, "seconds": round(seconds, 1), "cpu": round(cpu() - used, 1)}
        yield {**found, "peak_mb": int(done.stderr.split()[-1]) // 1000}


def cpu() -> float:
    """Seconds that processes which have ended took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--domains", type=int, default=1)
    parser.add_argument("--criteria", nargs="+", default=[name for name, row in CRITERIA.items() if not row.tiers])
    parser.add_argument("--folder", type=Path, help="where the statistics lie")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="moekern-planning-", dir=given.folder))
    try:
        path = write(work / "statistics.safetensors", given.layers, given.experts, given.domains)
        sizes = {"layers": given.layers, "experts": given.experts, "domains": given.domains}
        for line in lines(path, given.criteria):
            found = {"what": "plan", **sizes, **line, **machine()}
            print(json.dumps(found), flush=True)
            append(given.out, [found])
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
