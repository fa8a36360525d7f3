"""Kept plans through compressed-tensors and llm-compressor themselves: their pruned checkpoints hold the bytes that
moekern's hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.plan.interchange import exported, read_plan
from moekern.pruning.prune import prune
from tests.helpers.engines import WORKERS, Engines
from tests.helpers.in_flight import random_plan

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

IDS = [[20, 33, 41, 57, 90, 111, 18, 66, 77, 88], [200, 150, 60, 25, 31, 44, 55, 66, 77, 250]]
ROUTER, EXPERT = r"mlp\.gate\.weight$", r"mlp\.experts\.\d+\.\w+\.weight$"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_compressed_tensors_prunes_by_a_plan(name: str, original: Callable[[str], Path], tmp_path: Path) -> None:
    convert = pytest.importorskip("compressed_tensors.entrypoints.convert")
    source = original(name)
    layout = find_layout(open_checkpoint(source))
    plan = random_plan(layout, 5)
    prune(source, plan, tmp_path / "ours")
    pruner = convert.MagnitudeExpertPruner.from_pretrained(source, ROUTER, EXPERT, 0.5)
    kept = json.loads(exported(plan, layout, "compressed-tensors"))
    assert pruner.retained_experts.keys() == kept.keys()
    pruner.retained_experts = kept
    convert.convert_checkpoint(source, tmp_path / "theirs", pruner, max_workers=1)
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((tmp_path / which / "config.json").read_text()) for which in ("ours", "theirs")]
    assert configs[0] == configs[1]


def test_a_report_of_llm_compressor_is_a_plan(
    engines: Engines, needs: Callable[[str], None], original: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its REAP modifier prunes and reports; the report pruned by moekern gives the same weights."""
    needs("llm-compressor")
    source, report = original("qwen3_moe"), tmp_path / "report.json"
    request = {
        "source": str(source), "out": str(tmp_path / "theirs"), "sparsity": 0.375, "report": str(report), "ids": IDS,
    }  # fmt: skip
    done = engines.run("llm-compressor", "python", WORKERS / "compress_worker.py", json.dumps(request))
    assert done.returncode == 0, done.stderr
    layout = find_layout(open_checkpoint(source))
    plan = read_plan(report.read_text(), "report.json", layout)
    assert {len(layer.keep) for layer in plan.layers.values()} == {5}
    assert json.loads(exported(plan, layout, "llm-compressor")) == json.loads(report.read_text())
    prune(source, plan, tmp_path / "ours")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].bfloat16(), theirs[name]) for name in ours)
