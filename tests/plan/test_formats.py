"""What engines make of the formats of experts' weights."""

import pytest

from moekern.architectures import FAMILIES as TABLE
from moekern.errors import InputError
from moekern.plan.engines import names_of
from moekern.plan.formats import FAMILIES, LOADS, ComputedFormat, computed_format, format_finding, weight_format
from moekern.plan.targets import ENGINES

CT = "compressed-tensors"
MOST = "transformers vllm sglang llama.cpp ik_llama.cpp"
# family, format -> engines that load it, and those of which it is not known; the others do not.
READ = {
    "plain": ("qwen3_moe", "", f"{MOST} mlx-lm mistral.rs", ""),
    "fp8": ("qwen3_moe", "fp8", MOST, "mistral.rs"),
    "fp8 of DeepSeek-V3": ("deepseek_v3", "fp8", f"{MOST} mlx-lm", "mistral.rs"),
    "small blocks": ("deepseek_v3", "fp8/32x32", MOST, "mistral.rs"),
    "a scale a row": ("deepseek_v3", "fp8/weight_scale", "vllm sglang", "mistral.rs"),
    "a scale": ("mistral4", "fp8/tensor", f"{MOST} mlx-lm", "mistral.rs"),
    "awq": ("qwen3_moe", "awq", "vllm sglang", "transformers mistral.rs"),
    "gptq": ("qwen3_moe", "gptq", "vllm sglang llama.cpp ik_llama.cpp", "transformers mistral.rs"),
    "bitsandbytes": ("qwen3_moe", "bitsandbytes", "sglang", "transformers mistral.rs"),
    "auto-round": ("qwen3_moe", "auto-round", "vllm sglang", "transformers mistral.rs"),
    "torchao": ("qwen3_moe", "torchao", "", "transformers vllm mistral.rs"),
    "nobody's": ("qwen3_moe", "own-method", "", "mistral.rs"),
    "NVFP4": ("qwen3_moe", "modelopt/nvfp4", "vllm sglang llama.cpp ik_llama.cpp", "mistral.rs"),
    "another of ModelOpt": ("qwen3_moe", "modelopt/w4a8", "vllm sglang", "llama.cpp ik_llama.cpp mistral.rs"),
    "mxfp4": ("gpt_oss", "mxfp4", f"{MOST} mlx-lm", "mistral.rs"),
    "mxfp4 elsewhere": ("qwen3_moe", "mxfp4", "vllm sglang", "transformers mistral.rs"),
    "packed": (
        "qwen3_moe", f"{CT}/pack-quantized/group", MOST, "mistral.rs"
    ),
    "packed, Kimi": (
        "kimi_k25", f"{CT}/pack-quantized/group", f"{MOST} mlx-lm", "mistral.rs"
    ),
    "packed by rows": ("qwen3_moe", f"{CT}/pack-quantized/channel", "transformers vllm sglang", "mistral.rs"),
    "one FP8 scale": ("qwen3_moe", f"{CT}/float-quantized/tensor", "transformers vllm sglang", "mistral.rs"),
    "INT8": ("qwen3_moe", f"{CT}/int-quantized/channel", "vllm sglang llama.cpp ik_llama.cpp", "mistral.rs"),
    "mxfp4 of Kimi-K3": (
        "kimi_k3", f"{CT}/mxfp4-pack-quantized/group", f"{MOST} mlx-lm",
        "mistral.rs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_who_reads_what(case: str) -> None:
    family, weights, loads, unknown = READ[case]
    found = {engine: format_finding(engine, family, names_of(family), weights) for engine in ENGINES}
    assert {engine for engine, finding in found.items() if finding is None} == set(loads.split())
    assert {engine for engine, finding in found.items() if finding and finding.stops is None} == set(unknown.split())
    assert all(weights in finding.text for finding in found.values() if finding)


def test_the_tables_name_engines_and_families_that_there_are() -> None:
    assert {*LOADS, *FAMILIES} <= set(ENGINES)
    named = {family for formats in FAMILIES.values() for families in formats.values() for family in families}
    assert named <= {family.name for family in TABLE}


def _compressed(form: object, *strategies: object) -> dict[str, object]:
    groups = {f"group_{i}": {"weights": {"strategy": strategy}} for i, strategy in enumerate(strategies)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GIVEN: dict[str, tuple[object, tuple[str, ...], str]] = {  # quantization_config, endings of names -> the format
    "none": (None, (), ""),
    "broken": ("broken", (), ""),
    "no method": ({"bits": 4}, (), ""),
    "odd method": ({"quant_method": ["fp8"]}, (), "unknown"),
    "blocks": (FP8, ("weight_scale_inv",), "fp8"),
    "in capitals": ({**FP8, "quant_method": "FP8"}, ("weight_scale_inv",), "fp8"),
    "small blocks": ({**FP8, "weight_block_size": [32, 32]}, ("weight_scale_inv",), "fp8/32x32"),
    "a scale": ({"quant_method": "fp8"}, ("weight_scale_inv",), "fp8/tensor"),
    "a scale of other names": ({"quant_method": "fp8"}, ("weight_scale", "input_scale"), "fp8/weight_scale"),
    "packed": (_compressed("pack-quantized", "group"), (), f"{CT}/pack-quantized/group"),
    "older name": ({**_compressed("pack-quantized"), "quant_method": "compressed_tensors"}, (), f"{CT}/pack-quantized"),
    "two groups": (_compressed("float-quantized", "block", "channel"), (), f"{CT}/float-quantized/mixed"),
    "odd format": (_compressed("a\nb", ["group"]), (), f"{CT}/unknown"),
    "odd groups": ({**_compressed("int-quantized"), "config_groups": [3]}, (), f"{CT}/int-quantized"),
    "ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, (), "modelopt/nvfp4"),
    "ModelOpt, nested": ({"quant_method": "modelopt_fp4", "quantization": {"quant_algo": "FP8"}}, (), "modelopt/fp8"),
    "ModelOpt, not said": ({"quant_method": "modelopt"}, (), "modelopt"),
    "in a file of its own": (None, ("weight", "weight_scale", "weight_scale_2", "input_scale"), "modelopt/nvfp4"),
    "in a file of its own, FP8": (None, ("weight", "weight_scale", "input_scale"), "modelopt/fp8"),
}


@pytest.mark.parametrize("case", GIVEN)
def test_the_format_that_a_config_names(case: str) -> None:
    given, endings, expected = GIVEN[case]
    names = [f"model.layers.0.mlp.experts.0.up_proj.{ending}" for ending in endings]
    assert weight_format({"quantization_config": given}, names) == expected
    assert weight_format({"text_config": {"quantization_config": given}}, names) == expected


def test_computed_tensors_are_written_in_a_format_that_engines_load_beside_the_rest() -> None:
    assert computed_format("source", "") == ComputedFormat(None, "in the type of the weights that they replace")
    assert computed_format("bf16", "").dtype == "BF16"
    for weights in ("fp8", "fp8/32x32", "fp8/tensor", "fp8/weight_scale", "mxfp4", f"{CT}/pack-quantized/group"):
        found = computed_format("source", weights)
        assert found.dtype is None
        assert f"quantised again, to {weights}: engines load the experts of a layer in one format" in found.why
        with pytest.raises(InputError, match=f"--computed-dtype bf16: experts are stored as {weights}"):
            computed_format("bf16", weights)
    for weights in ("gptq", "awq", "modelopt/nvfp4", f"{CT}/nvfp4-pack-quantized", "bitsandbytes", "unknown"):
        with pytest.raises(InputError, match=f"stored as {weights}, which is read, and not written; refit an"):
            computed_format("source", weights)
    with pytest.raises(InputError, match="--computed-dtype fp8: expected one of source, bf16"):
        computed_format("fp8", "")
