"""What rules of `--target` stop for other reasons than the family: no engine gives the model's tokens there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.served import check_folder, verdict
from moekern.plan.targets import Target
from moekern.pruning.prune import prune
from tests.helpers.engines import Engines, transformers
from tests.helpers.in_flight import random_plan

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]


def without_scoring(config: dict[str, Any]) -> None:
    del config["scoring_func"]


def all_groups_chosen(config: dict[str, Any]) -> None:
    config["topk_group"] = config["n_group"]


@pytest.mark.parametrize("change", [without_scoring, all_groups_chosen])
def test_configs_that_llama_cpp_does_not_follow(
    change: Callable[[dict[str, Any]], None], engines: Engines, needs: Callable[[str], None],
    original: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    needs("llama.cpp")
    source = original("deepseek_v3")
    prune(source, random_plan(find_layout(open_checkpoint(source)), 1, 3), tmp_path / "pruned")
    path = tmp_path / "pruned" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    found = check_folder(path.parent).found
    assert not verdict(found["llama.cpp"])
    assert verdict(found["transformers"])
    assert engines.llama_cpp([path.parent])[path.parent] != transformers(path.parent).tokens


@pytest.mark.parametrize("environment", ["vllm", "vllm-0.33", "llama.cpp"])
def test_counts_that_differ_between_layers(
    environment: str, engines: Engines, needs: Callable[[str], None], original: Callable[[str], Path], tmp_path: Path
) -> None:
    needs(environment)
    source, out = original("qwen3_moe"), tmp_path / "pruned"
    layers = find_layout(open_checkpoint(source)).layers
    keep = {key: LayerPlan((1, 4, 6) if i % 2 else (0, 2, 3, 5, 7)) for i, key in enumerate(layers)}
    prune(source, Plan(keep, {"allow_nonuniform": True}), out)
    assert not verdict(check_folder(out, [Target("vllm"), Target("llama.cpp")]).found[environment.partition("-")[0]])
    answer = engines.llama_cpp([out]) if environment == "llama.cpp" else engines.vllm([out], environment)
    assert isinstance(answer[out], str)
