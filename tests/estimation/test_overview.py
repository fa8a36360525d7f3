"""What `inspect` says of who can run a model."""

from pathlib import Path
from typing import Any

import pytest

from moekern.estimation.overview import overview
from tests.helpers.commands import document, moekern
from tests.helpers.layouts import BIAS, GUD, moe_keys, write_checkpoint
from tests.helpers.published import write

CONFIG: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 1}
OWN = {"auto_map": {"AutoConfig": "a.A", "AutoModelForCausalLM": "m.M"}}


@pytest.mark.parametrize(
    ("config", "run_by", "not_run"),
    [
        ({"model_type": "deepseek_v3"}, "transformers", ""),
        ({"model_type": "deepseek_v3", **OWN}, "transformers", ""),
        ({"model_type": "something_new", **OWN}, "its own code", ""),
        ({"model_type": "kimi_k2", **OWN}, "its own code", ""),
        ({"model_type": "kimi_k2"}, "", "transformers has no class for model_type 'kimi_k2'"),
        ({"model_type": "something_new", "auto_map": {"AutoTokenizer": "t.T"}}, "", "not known whether transformers"),
        ({"model_type": "deepseek_vl_v2"}, "", "transformers has no class for model_type 'deepseek_vl_v2'"),
        ({"model_type": "diffusion_gemma"}, "transformers", ""),  # its tensors are another family's
        ({}, "", "not known whether transformers has a class for model_type ''"),
    ],
)
def test_who_runs_it(config: dict[str, Any], run_by: str, not_run: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", CONFIG | config, moe_keys("model.layers.0.mlp.", GUD, bias=BIAS))
    found = overview(folder)
    assert found.run_by == run_by
    assert not_run in found.not_run
    assert bool(found.not_run) != bool(run_by)
    assert document("inspect", folder)["run_by"] == run_by


def test_what_no_code_is_known_for_is_pruned_and_verified_by_bytes(tmp_path: Path) -> None:
    shown = moekern("inspect", write("deepseek_v41", tmp_path / "m")).stdout
    assert "nothing: transformers has no class for model_type 'deepseek_v41'; pruned, and verified by its bytes" in (
        " ".join(shown.replace("│", " ").split())
    )
    assert "its Engram tables are copied as they are" in " ".join(shown.split())


@pytest.mark.parametrize(("held", "said"), [(16, "some can go"), (24, "all stay: no key of config.json holds")])
def test_whether_experts_can_lose_channels(held: int, said: str, tmp_path: Path) -> None:
    keys = moe_keys("model.layers.0.mlp.", GUD)
    keys |= {name: ("BF16", [32, 16]) for name in keys if "down_proj" in name}
    config = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": held}
    folder = write_checkpoint(tmp_path / "m", config, keys)
    found = document("inspect", folder)
    assert (found["width"], found["not_narrowed"] is None) == (16, held == 16)
    assert said in " ".join(moekern("inspect", folder).stdout.split())
