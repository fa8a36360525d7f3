"""Where checkpoints run, by their headers and config."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.plan.engines import Finding, registries
from moekern.plan.served import check_folder, served_as, verdict
from moekern.plan.shards import Shards, shards_of
from moekern.plan.targets import ENGINES, parse_target
from moekern.pruning import prune
from tests.helpers import synthetic
from tests.helpers.in_flight import random_plan


def qwen_like(folder: Path, model_type: str, architecture: str, mtp: int | None = None, **config: Any) -> Path:
    """A checkpoint in the Qwen layout under another name; mtp: the experts of its MTP layer."""
    given, tensors = synthetic.qwen3()
    if mtp is not None:
        _, more = synthetic.qwen3(layers=1, experts=mtp, seed=1)
        tensors |= {name.replace("model.layers", "mtp.layers"): t for name, t in more.items() if ".layers." in name}
    published = {key: 1 for key in registries()["mlx-lm"]["needs"].get(model_type, ())}
    names = {"model_type": model_type, "architectures": [architecture]}
    return synthetic.write(folder / "in", {**published, **given, **names, **config}, tensors)


def rewritten(folder: Path, **changed: Any) -> None:
    """config.json with these keys, without those that are None."""
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def told(folder: Path, target: str) -> tuple[bool | None, str]:
    row = check_folder(folder, [parse_target(target)]).found[target]
    return verdict(row), "; ".join(finding.text for finding in row)


def test_an_engine_that_does_not_know_the_model(tmp_path: Path) -> None:
    folder = qwen_like(tmp_path, "flex_olmo", "FlexOlmoForCausalLM")
    report = check_folder(folder)
    assert {name: verdict(row) for name, row in report.found.items()} == {
        "transformers": True, "vllm": True, "sglang": True, "llama.cpp": False, "ik_llama.cpp": False,
        "mlx-lm": False, "mistral.rs": None,
    }  # fmt: skip
    assert "does not know FlexOlmoForCausalLM (0c1e57098" in report.found["llama.cpp"][0].text
    assert report.nearest["llama.cpp"] == "; no other count would help"
    assert report.document()["targets"]["mistral.rs"]["runs"] is None
    assert not report.good
    assert check_folder(folder, [parse_target("mistral.rs")]).good  # not known is not refused


def test_the_release_that_a_family_needs(tmp_path: Path) -> None:
    folder = qwen_like(tmp_path, "flint", "FlintForCausalLM")
    assert told(folder, "transformers") == (True, "needs transformers >= 5.21")


MODES = {  # of Qwen3-Next with 8 experts, pruned to 4: mode -> llama.cpp's verdict, words
    "drop": (True, "there are none; convert with --no-mtp"),
    "keep": (True, "MTP layers have 8 experts, the others 4; convert with --no-mtp"),
    "prune": (True, ""),
}


@pytest.mark.parametrize("mode", MODES)
def test_mtp_modes_of_qwen3_next(mode: Any, tmp_path: Path) -> None:
    source = qwen_like(tmp_path, "qwen3_next", "Qwen3NextForCausalLM", mtp=8)
    prune(source, random_plan(find_layout(open_checkpoint(source)), 0), tmp_path / "out", mtp=mode)
    runs, text = told(tmp_path / "out", "llama.cpp")
    assert runs is MODES[mode][0]
    assert MODES[mode][1] in text
    assert bool(text) is bool(MODES[mode][1])
    assert told(tmp_path / "out", "mlx-lm")[0] is True


@pytest.mark.parametrize("mode", ["prune", "drop", "keep"])
def test_mtp_modes_of_deepseek_v3(mode: Any, tmp_path: Path) -> None:
    """llama.cpp's converter leaves its MTP layers out, whatever is in them."""
    config, tensors = synthetic.deepseek_v3()
    source = synthetic.write(tmp_path / "in", {**config, "architectures": ["DeepseekV3ForCausalLM"]}, tensors)
    plan = random_plan(find_layout(open_checkpoint(source)), 0)
    prune(source, plan, tmp_path / "out", mtp=mode)
    assert told(tmp_path / "out", "llama.cpp") == (True, "")
    runs, text = told(tmp_path / "out", "mlx-lm")
    assert runs is (mode == "drop"), text
    assert ("speculative decoding" in told(tmp_path / "out", "vllm")[1]) is (mode == "keep")


def test_a_config_as_transformers_5_saves_it(tmp_path: Path) -> None:
    """Without the keys that mlx-lm's code has no default for."""
    folder = qwen_like(tmp_path, "qwen3_moe", "Qwen3MoeForCausalLM")
    assert told(folder, "mlx-lm") == (True, "")
    rewritten(folder, rope_theta=None, rope_parameters={"rope_theta": 1e6})
    runs, text = told(folder, "mlx-lm")
    assert runs is False
    assert text.startswith(
        "its code needs rope_theta at the root of config.json; transformers 5 saves them in rope_par"
    )
    assert check_folder(folder).nearest["mlx-lm"] == "; no other count would help"


@pytest.mark.parametrize(
    ("rope", "taken"),
    [
        ({"rope_theta": 10000.0, "rope_type": "default"}, None),
        ({"rope_theta": 10000}, None),
        ({"rope_theta": 5e5}, "would take rope_theta 10000 for the 500000 there"),
        ({"rope_theta": 1e4, "rope_type": "yarn"}, "would take rope_theta 10000 without yarn for the 10000 there"),
        ({"full_attention": {"rope_theta": 5e5}}, None),
    ],
)
def test_a_default_that_mlx_lm_takes_in_the_place_of_the_models_own(
    rope: dict[str, Any], taken: str | None, tmp_path: Path
) -> None:
    folder = qwen_like(tmp_path, "olmoe", "OlmoeForCausalLM")
    rewritten(folder, rope_theta=None, rope_parameters=rope)
    runs, text = told(folder, "mlx-lm")
    assert runs is (taken is None), text
    assert (taken or "") in text
    rewritten(folder, rope_theta=5e5)
    assert told(folder, "mlx-lm") == (True, "")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"num_key_value_heads": 2, "moe_intermediate_size": 48}, Shards(4, 2, 48)),
        ({"intermediate_size": 96}, Shards(4, 4, 96)),
        ({"kv_lora_rank": 8, "num_key_value_heads": 2}, Shards(4)),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}, Shards(4, 4, block=16)),
        ({"num_attention_heads": None}, Shards()),
        ({"torch_dtype": "float32", "dtype": None}, Shards(4, 4, bytes=4)),
        ({"dtype": ["float16"]}, Shards(4, 4)),
        ({"num_attention_heads": "four", "num_key_value_heads": -1}, Shards()),
    ],
)
def test_what_ranks_share_is_read_from_the_text_models_config(more: dict[str, Any], expected: Shards) -> None:
    config = {"num_attention_heads": 4, **more}
    assert shards_of(config, "") == expected
    assert shards_of({"vision_config": {"num_attention_heads": 5}, "text_config": config}, "text_config") == expected


def test_the_width_is_that_of_the_tensors(tmp_path: Path) -> None:
    config, tensors = synthetic.qwen3()
    rng = np.random.default_rng(0)
    for name in tensors:
        if ".experts." in name:
            tensors[name] = synthetic.data(rng, "BF16", [4, 20] if "down_proj" in name else [20, 4])
    config |= {"dtype": "bfloat16", "moe_intermediate_size": 24}
    folder = synthetic.write(tmp_path / "in", config, tensors)
    runs, text = told(folder, "transformers")
    assert runs is False
    assert text.startswith("experts have 20 channels: its grouped product")
    assert text.endswith("nearest width that runs: 16 or 24")
    assert check_folder(folder, [parse_target("transformers")]).nearest == {"transformers": ""}


def test_ranks_that_heads_cannot_be_spread_over_are_refused(tmp_path: Path) -> None:
    numbers = {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 48}
    folder = qwen_like(tmp_path, "qwen3_moe", "Qwen3MoeForCausalLM", **numbers)
    assert told(folder, "vllm:tp=4") == (True, "")
    assert told(folder, "vllm:tp=3") == (False, "tp=3 does not divide the 4 attention heads")


def test_the_weights_format_counts(tmp_path: Path) -> None:
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert told(qwen_like(tmp_path, "qwen3_moe", "Qwen3MoeForCausalLM", **fp8), "mlx-lm")[0] is False


def test_scales_beside_experts_count_too(tmp_path: Path) -> None:
    """FP8 with "weight_scale" is found by vLLM and SGLang alone; config.json is the same for all."""
    for companions, expected in {"fp8_static": "fp8/weight_scale", "fp8_block": "fp8/tensor"}.items():
        config, tensors = synthetic.qwen3(companions)
        fp8 = {**config, "quantization_config": {"quant_method": "fp8"}}
        checkpoint = open_checkpoint(synthetic.write(tmp_path / companions, fp8, tensors))
        assert served_as(find_layout(checkpoint), checkpoint.config).quantization == expected
    runs = {name: verdict(row) for name, row in check_folder(tmp_path / "fp8_static").found.items()}
    assert runs == {
        "transformers": False, "vllm": True, "sglang": True, "llama.cpp": False, "ik_llama.cpp": False,
        "mlx-lm": False, "mistral.rs": None,
    }  # fmt: skip


def test_formats_that_only_a_file_of_their_own_names(tmp_path: Path) -> None:
    config, tensors = synthetic.qwen3("nvfp4")
    folder = synthetic.write(tmp_path / "in", config, tensors)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    runs, text = told(folder, "transformers")
    assert runs is False
    assert "modelopt/nvfp4" in text
    assert told(folder, "vllm")[0] is True
    assert told(folder, "llama.cpp")[0] is True


def test_a_config_that_names_nothing(tmp_path: Path) -> None:
    """Without class names, or with odd ones, those of the family count."""
    config, tensors = synthetic.qwen3()
    for i, odd in enumerate((None, [], [3], "Qwen3MoeForCausalLM", ["A\nB"], ["x" * 9999])):
        given = {**config, "architectures": odd}
        folder = synthetic.write(tmp_path / f"in{i}", given, tensors)
        assert all(verdict(row) for row in check_folder(folder).found.values()), odd


def test_verdicts() -> None:
    yes, unknown, no = Finding(False, ""), Finding(None, ""), Finding(True, "")
    assert [verdict(row) for row in ([], [yes], [yes, unknown], [unknown, no])] == [True, True, None, False]
    assert len(ENGINES) == 7
