"""What engines make of the formats that experts' weights are stored in.

Read from their sources (versions in `engines.json`); what transformers 5.23, mlx-lm 0.32.2 and llama.cpp's converter
make of each format was also run, on checkpoints of Qwen3-MoE and DeepSeek-V3 with an odd number of experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moekern.errors import InputError
from moekern.plan.engines import Finding, registries

NAME = re.compile(r"[\w.-]{1,100}")  # of a class, a model type or a method; anything else in a config is no name
CT = "compressed-tensors"

# Formats as `weight_format` names them, or the beginnings of their names: whether they stop the engine, None where that
# is not known. The longest that fits counts.
CONVERTER: Mapping[str, bool | None] = {  # conversion/base.py, dequant_model; any other raises there
    **dict.fromkeys(("bitnet", "fp8", "gptq", "modelopt/fp8", "modelopt/nvfp4", "modelopt/mixed_precision"), False),
    "fp8/weight_scale": True,  # it looks for weight_scale_inv alone
    "modelopt": None,
    **dict.fromkeys((f"{CT}/{kind}-quantized" for kind in ("float", "int", "naive", "pack", "nvfp4-pack")), False),
    f"{CT}/mixed-precision": None,
    **{f"{CT}/{kind}-quantized/tensor": True for kind in ("float", "int", "naive", "pack")},
    **{f"{CT}/{kind}-quantized/group": True for kind in ("float", "int", "naive")},
    **{f"{CT}/{kind}-quantized/mixed": True for kind in ("float", "int", "naive", "pack")},
    f"{CT}/pack-quantized/channel": True,
}
# quantizers/auto.py and integrations/. transformers 5 keeps a layer's experts in one stack, which most methods, made
# for linear layers, know nothing of.
TRANSFORMERS: Mapping[str, bool | None] = {
    **dict.fromkeys(("fp8", f"{CT}/float-quantized", f"{CT}/pack-quantized"), False),
    **dict.fromkeys((f"{CT}/nvfp4-pack-quantized", f"{CT}/mxfp4-pack-quantized"), False),
    "fp8/weight_scale": True,  # the scales are not found
    f"{CT}/int-quantized": True,  # stops while experts are put together
}
LOADS: Mapping[str, Mapping[str, bool | None]] = {
    "transformers": TRANSFORMERS, "llama.cpp": CONVERTER, "ik_llama.cpp": CONVERTER, "mlx-lm": {},
}  # fmt: skip
# engine -> format -> the families whose own code reads it. mlx_lm/models: `sanitize`; FP8 is in its list.
FAMILIES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "transformers": {"mxfp4": ("gpt_oss", "openai_privacy_filter")},
    "llama.cpp": {"mxfp4": ("gpt_oss",), f"{CT}/mxfp4-pack-quantized": ("kimi_k3",), "": ("deepseek_v4",)},
    "mlx-lm": {
        "fp8/tensor": ("mistral4",),
        "mxfp4": ("gpt_oss",),
        f"{CT}/mxfp4-pack-quantized": ("kimi_k3",),
        f"{CT}/pack-quantized": ("deepseek_v3", "kimi_k25", "mistral4"),
        "modelopt/nvfp4": ("muse_spark",),
    },
}
# --computed-dtype: the checkpoint's own format, or bfloat16. Formats that `requantised` can write again; of packed ones
# those with zero points are found out by their tensors.
COMPUTED = ("source", "bf16")
WRITTEN = (
    "fp8", "fbgemm_fp8", "mxfp4", "modelopt/fp8", "quark",
    *(f"{CT}/{kind}-quantized" for kind in ("float", "int", "naive", "pack", "mxfp4-pack")),
)  # fmt: skip
# vLLM and SGLang read whatever method they list, but for these, of which vLLM's code says nothing about experts.
UNREAD = ("fbgemm_fp8", "fp_quant", "torchao")
RENAMED = {"vllm": {"auto-round": "inc"}, "transformers": {"bitsandbytes": "bitsandbytes_4bit"}}


def format_finding(engine: str, family: str, known_as: frozenset[str], weights: str) -> Finding | None:
    """Why the engine does not load experts stored as `weights`, or that this is not known; None where it does."""
    if not weights:
        return None
    stops = _stops(engine, family, known_as, weights)
    if stops is None:
        return Finding(None, f"whether it reads experts stored as {weights} is not known")
    what = "llama.cpp's converter" if engine in ("llama.cpp", "ik_llama.cpp") else "it"
    return Finding(True, f"{what} does not read experts stored as {weights}; dequantise them first") if stops else None


def _stops(engine: str, family: str, known_as: frozenset[str], weights: str) -> bool | None:
    if engine == "mistral.rs":  # nobody has read what it does
        return None
    method = weights.partition("/")[0]
    method = RENAMED.get(engine, {}).get(method, method)
    if engine in ("vllm", "sglang"):
        listed = method in registries()[engine]["methods"]
        return None if listed and method in UNREAD else not listed
    if engine == "mlx-lm" and weights == "fp8":
        return not known_as & set(registries()[engine]["fp8"])
    own = FAMILIES["llama.cpp" if engine == "ik_llama.cpp" else engine]
    if any(family in families and _begins(weights, name) for name, families in own.items()):
        return False
    fitting = [name for name in LOADS[engine] if _begins(weights, name)]
    if fitting:
        return LOADS[engine][max(fitting, key=len)]
    return None if engine == "transformers" and method in registries()[engine]["methods"] else True


def _begins(weights: str, name: str) -> bool:
    """Whether the format has this name, or one that begins with it: "fp8/32x32" with "fp8"."""
    return not name or weights == name or weights.startswith(name + "/")


@dataclass(frozen=True)
class ComputedFormat:
    """dtype: that of safetensors in which computed weights of experts are written, None where it is the format that the
    source has them in; why, in a line."""

    dtype: str | None
    why: str


def computed_format(asked: str, weights: str) -> ComputedFormat:
    """How computed tensors of experts are written into a checkpoint whose experts are stored as `weights`.

    Engines, all of them, load the experts of a layer in one format, and projections that are not computed stay what
    they are: so computed ones of a quantised checkpoint are quantised again, whatever engine it is for. Raises
    InputError for another word than those of COMPUTED, and where that cannot be.
    """
    flag = f"--computed-dtype {asked}"
    if asked not in COMPUTED:
        raise InputError(f"{flag}: expected one of {', '.join(COMPUTED)}")
    if not weights:
        if asked == "bf16":
            return ComputedFormat("BF16", "as asked, in bfloat16; other weights keep their type")
        return ComputedFormat(None, "in the type of the weights that they replace")
    if asked == "bf16":
        what = f"experts are stored as {weights}, and engines load the experts of a layer in one format"
        raise InputError(f"{flag}: {what}; use --computed-dtype source")
    if not any(_begins(weights, name) for name in WRITTEN):
        what = f"experts are stored as {weights}, which is read, and not written"
        raise InputError(f"{flag}: {what}; refit an unquantised twin of the model, and quantise the result")
    return ComputedFormat(None, f"quantised again, to {weights}: engines load the experts of a layer in one format")


def weight_format(config: Mapping[str, Any], experts: Iterable[str] = ()) -> str:
    """How experts are stored, as far as engines tell it apart: the method of config.json with what one method has
    several of, "fp8/tensor", "compressed-tensors/pack-quantized/group", "modelopt/nvfp4"; "" for plain numbers.

    experts: names of their tensors. They show ModelOpt's formats where only hf_quant_config.json names them.
    """
    endings = {name.rpartition(".")[2] for name in experts}
    given = _given(config)
    method = name_in(given.get("quant_method")).lower().replace("_tensors", "-tensors")
    if "quant_method" in given and not method:
        return "unknown"
    if not method:
        if "weight_scale_2" in endings:
            return "modelopt/nvfp4"
        return "modelopt/fp8" if {"weight_scale", "input_scale"} <= endings else ""
    if method == CT:
        return "/".join(filter(None, (method, name_in(given.get("format")) or "unknown", _strategy(given))))
    if method == "fp8":
        blocks = given.get("weight_block_size")
        if "weight_scale" in endings:
            return "fp8/weight_scale"
        if blocks == [32, 32]:
            return "fp8/32x32"
        return method if blocks or "weight_scale_inv" not in endings else "fp8/tensor"
    if method.startswith("modelopt"):
        nested = given.get("quantization")
        algorithm = (nested if isinstance(nested, dict) else given).get("quant_algo")
        return "/".join(filter(None, ("modelopt", name_in(algorithm).lower())))
    return method


def _given(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantisation config of the model, or of its text part."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        given = holder.get("quantization_config")
        if isinstance(given, dict) and "quant_method" in given:
            return given
    return {}


def _strategy(given: Mapping[str, Any]) -> str:
    """What scales of compressed-tensors go with: "channel", "group"; "mixed" for groups of modules that differ."""
    groups = given.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    found = {name_in(w.get("strategy")) for w in weights if isinstance(w, dict)}
    return "mixed" if len(weights) > 1 else "".join(found)


def name_in(value: object) -> str:
    """A name in a config, which may hold anything; "" for what is none."""
    return value if isinstance(value, str) and NAME.fullmatch(value) else ""
