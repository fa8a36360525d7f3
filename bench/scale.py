"""Calibrate the shape of Kimi-K2 (1T parameters, FP8) whose weights are holes: all machinery, stubs of the arithmetic.

python -m bench.scale [--layers 61] [--tokens 8192] [--gigabytes 8] [--whole-experts] [--folder DIR]

Bytes are read, groups of experts are taken one after another, hidden states and rows wait in memory or in a file, and
every sum is added. What is no machinery is left out: attention, shared experts and what experts make of their rows
(their own input), and, but with --whole-experts, the conversion of experts. Embeddings and routers get random numbers,
norms ones. Tells each layer on standard error, and prints a JSON line: seconds, peak resident memory, and what the run
said of memory and time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import checkpoints
from moekern.benchmark.records import machine
from moekern.calibration import calibrate
from moekern.data.batches import Batch, TokenData
from moekern.model import experts, layerwise
from moekern.model.compute import Compute
from moekern.model.expert_groups import ExpertGroups
from moekern.model.layerwise import LayerwiseModel

LENGTH = 512  # tokens of a sequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--gigabytes", type=float, default=8, help="of memory")
    parser.add_argument("--whole-experts", action="store_true", help="convert experts too")
    parser.add_argument("--folder", type=Path, help="where the checkpoint and what does not fit into memory lie")
    given = parser.parse_args()
    said: list[str] = []
    logging.getLogger("moekern").addHandler(_Said(said))
    logging.getLogger("moekern").setLevel(logging.INFO)
    work = Path(tempfile.mkdtemp(prefix="moekern-scale-", dir=given.folder))
    try:
        folder = checkpoints.write(work / "model", checkpoints.kimi_k2(given.layers))
        _as_v3(folder)
        stub(given.whole_experts)
        ids = torch.randint(1000, (given.tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
        data = TokenData((Batch("text", ids),), {"seed": 0}, 4)
        compute = Compute(dtype="bfloat16", memory=round(given.gigabytes * (1 << 30)), spill=work)
        start = time.perf_counter()

        def told(done: float, total: int) -> None:
            if done == int(done):
                print(f"layer {done:.0f} of {total}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

        calibrate(folder, data, compute, out=work / "statistics.safetensors", progress=told)
        seconds = round(time.perf_counter() - start, 1)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    line = {"layers": given.layers, "tokens": given.tokens, "gigabytes": given.gigabytes, "seconds": seconds}
    print(json.dumps({**line, "peak": peak(), "said": said, "machine": machine()}))


class _Said(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _as_v3(folder: Path) -> None:
    """Kimi-K2 is DeepSeek-V3's code with other numbers."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def stub(whole_experts: bool) -> None:
    """Leave out what is no machinery."""
    load, fill = LayerwiseModel._load, ExpertGroups.fill
    skeleton = layerwise.fill_skeleton

    def filled(self: LayerwiseModel, i: int, after: int | None) -> None:
        load(self, i, after)
        layer: Any = self.layers[i]
        for parameter in layer.parameters():
            if parameter.ndim == 1 and not parameter.is_meta:
                parameter.data.fill_(1)
        layer.self_attn.forward = lambda hidden_states, **more: (torch.zeros_like(hidden_states), None)
        if i in self.moe_keys:
            layer.mlp.gate.weight.data.normal_(0, 0.02)
            layer.mlp.shared_experts.forward = torch.zeros_like
        else:
            layer.mlp.forward = torch.zeros_like

    def outside(model: LayerwiseModel, keys: Any) -> None:
        skeleton(model, keys)
        inside: Any = model.model
        inside.get_input_embeddings().weight.data[:1000].normal_()

    def unfilled(self: ExpertGroups, i: int, numbers: range, tensors: Mapping[str, Tensor]) -> nn.Module:
        return fill(self, i, numbers, tensors) if whole_experts else self._with(len(numbers))[i]

    LayerwiseModel._load = filled  # type: ignore[method-assign]
    layerwise.fill_skeleton = outside
    ExpertGroups.fill = unfilled  # type: ignore[method-assign]
    experts.halves = lambda module: lambda block, rows, offsets: rows  # type: ignore[assignment, return-value]


def peak() -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
