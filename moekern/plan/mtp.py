"""What engines make of MTP layers (multi-token prediction), by family: read from their sources, as in `targets`.

transformers does not load them, and mistral.rs looks tensors up by name. vLLM and SGLang load them for speculative
decoding only. llama.cpp's converter (conversion/) and mlx-lm (each model's `sanitize`) differ from family to family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from moekern.plan.engines import Finding


@dataclass(frozen=True, slots=True)
class Mtp:
    """The MTP layers of a checkpoint: the experts of those that have any, and the beginnings of their keys."""

    counts: tuple[int, ...]
    prefixes: tuple[str, ...]


class Converter(Enum):
    """What llama.cpp's converter does with MTP layers."""

    SKIPS = "leaves them out"
    OPTION = "converts them, or leaves them out with --no-mtp"
    WAITS = "as OPTION, and waits for them where there are none"
    ALWAYS = "converts them, with no option"
    DENSE = "as ALWAYS, where they have no experts"
    STOPS = "has no place for them"


# conversion/*.py: qwen.py (_QwenMtpMixin asserts that there is one), mimo.py (always counts three), mellum.py (takes
# mtp.layers.0 for layer 0), exaone.py (looks its experts up in layer 0), glm.py, deepseek.py, dots3.py, hunyuan.py,
# hy_v4.py, ernie.py, bailingmoe.py, bailingmoe3.py, nemotron.py, step3.py, qwen4exp.py.
CONVERTER: Mapping[str, Converter] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k25", "deepseek_v4"), Converter.SKIPS),
    **dict.fromkeys(("ernie4_5_moe", "hy_v4", "qwen4_exp"), Converter.SKIPS),
    **dict.fromkeys(("deepseek_v32", "glm4_moe", "glm4v_moe", "glm4_moe_lite", "glm_moe_dsa"), Converter.OPTION),
    **dict.fromkeys(("glm5_next", "dots3_note", "hy_v3", "bailing_hybrid"), Converter.OPTION),
    **dict.fromkeys(("nemotron_h", "step3p7"), Converter.OPTION),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe", "mimo_v2_flash"), Converter.WAITS),
    "bailing_moe_v2": Converter.ALWAYS,
    "exaone_moe": Converter.DENSE,
    "mellum": Converter.STOPS,
}
# mlx_lm/models: what `sanitize` leaves out. Weights that the model has no place for stop the loading; deepseek_v3 knows
# layer 61 only, mellum none.
MLX_LEAVES_OUT: Mapping[str, tuple[str, ...]] = {"deepseek_v3": ("model.layers.61",), "mellum": ()}


def mtp_finding(engine: str, family: str, mtp: Mtp, count: int) -> Finding | None:
    """What the engine makes of the MTP layers of a model with `count` experts in the others; None: nothing to say."""
    others = [n for n in mtp.counts if n != count]
    differ = f"MTP layers have {max(others)} experts, the others {count}" if others else ""
    if engine in ("llama.cpp", "ik_llama.cpp"):
        return _converted(family, mtp, differ)
    if engine == "mlx-lm" and family in MLX_LEAVES_OUT:
        known = MLX_LEAVES_OUT[family]
        left = [prefix for prefix in mtp.prefixes if not prefix.startswith(known)] if known else list(mtp.prefixes)
        return Finding(True, f"has no place for MTP layers ({left[0]}*); prune with --mtp drop") if left else None
    if engine in ("vllm", "sglang") and differ:
        return Finding(False, f"{differ}; run it without speculative decoding")
    return None


def _converted(family: str, mtp: Mtp, differ: str) -> Finding | None:
    """The same for files that llama.cpp's converter makes."""
    mode = CONVERTER.get(family)
    if not mtp.prefixes:
        waits = "its converter waits for MTP layers, and there are none; convert with --no-mtp"
        return Finding(False, waits) if mode is Converter.WAITS else None
    if mode is None:
        return Finding(None, f"what its converter makes of the MTP layers of {family} is not known")
    if mode is Converter.STOPS:
        return Finding(True, "its converter stops at MTP layers; prune with --mtp drop")
    if mode is Converter.DENSE and mtp.counts:
        return Finding(True, "its converter takes no experts in MTP layers; prune with --mtp drop")
    if not differ or mode is Converter.SKIPS:
        return None
    if mode is Converter.ALWAYS:
        return Finding(True, f"{differ}; prune with --mtp prune or drop")
    return Finding(False, f"{differ}; convert with --no-mtp")
