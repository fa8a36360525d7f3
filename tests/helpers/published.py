"""Checkpoints with the tensors of published ones: all names, small shapes, random bytes.

Only experts and what holds a row or a number for each of them have a side of EXPERTS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import synthetic
from tests.helpers.hub_names import INDEXED
from tests.helpers.layouts import BIAS, GUD, STACK, W123, moe_keys
from tests.helpers.synthetic import EXPERTS, TOP_K, Tensors, data

Keys = dict[str, tuple[str, list[int]]]
FP8, MXFP4 = INDEXED["fp8"], INDEXED["mxfp4"]
INT4 = ("weight_packed", "weight_scale", "weight_shape")  # symmetric, columns in order
SIZES = {"num_hidden_layers": 2, "num_experts_per_tok": TOP_K}
ROUTED, LOCAL, PLAIN = ({**SIZES, key: EXPERTS} for key in ("n_routed_experts", "num_local_experts", "num_experts"))


def plain(prefix: str, names: str) -> Keys:
    """Tensors that stay as they are."""
    return {prefix + name: ("BF16", [12, 32]) for name in names.split()}


def v4(prefix: str, *, hashed: bool = False) -> Keys:
    """A block of DeepSeek V4 with the bias of image tokens, which layers that choose by token id have too."""
    keys = moe_keys(f"{prefix}ffn.", W123, bias="" if hashed else "gate.bias", suffixes=MXFP4)
    if hashed:
        keys[f"{prefix}ffn.gate.tid2eid"] = ("I64", [96, TOP_K])
    keys[f"{prefix}ffn.gate.bias_vl"] = ("F32", [EXPERTS])
    return keys | plain(prefix, "ffn.shared_experts.w1.weight attn.wq_a.weight hc_ffn_fn")


def deepseek_v4() -> tuple[dict[str, Any], Keys]:
    keys = v4("layers.0.", hashed=True) | v4("layers.1.") | v4("mtp.0.")
    keys |= plain("", "embed.weight head.weight vision.blocks.0.mlp.w1.weight mtp.0.e_proj.weight")
    return {"model_type": "deepseek_v4", "num_nextn_predict_layers": 1, **ROUTED}, keys


def deepseek_v41() -> tuple[dict[str, Any], Keys]:
    keys = v4("layers.0.") | v4("layers.1.")
    for number in range(3):  # of the drafts, which are under the same name as MTP layers
        keys |= v4(f"mtp.{number}.")
    keys |= plain("layers.1.engram.", "q_weight k_weight wkv.weight")
    keys |= {"layers.1.engram.embed.weight": ("F8_E4M3", [999, 256]), "layers.1.engram.embed.scale": ("U8", [999, 12])}
    keys |= plain("", "embed.weight mtp.2.markov_head.weight mtp.2.confidence_head.proj.weight aligner.w1.weight")
    return {"model_type": "deepseek_v41", "text_config": {**ROUTED, "num_nextn_predict_layers": 3}}, keys


def kimi_k3() -> tuple[dict[str, Any], Keys]:
    """Experts work in a space of their own, half as wide; what leads there and back belongs to no expert."""
    block = "language_model.model.layers.1.block_sparse_moe."
    keys = moe_keys(block, W123, bias=BIAS, suffixes=INT4)
    keys |= plain(block, "routed_expert_down_proj.weight routed_expert_up_proj.weight routed_expert_norm.weight")
    keys |= plain("language_model.model.layers.", "0.mlp.gate_proj.weight 0.mlp_res_proj.weight 1.mlp_res_norm.weight")
    keys |= plain("", "vision_tower.encoder.blocks.0.mlp.fc0.weight")
    text = {**PLAIN, "model_type": "kimi_linear", "num_experts_per_token": TOP_K, "num_expert_group": 1}
    return {"model_type": "kimi_k3", "text_config": text}, keys


def glm5_next() -> tuple[dict[str, Any], Keys]:
    keys: Keys = {}
    for number in range(3):
        keys |= moe_keys(f"model.language_model.layers.{number}.mlp.", GUD, bias=BIAS, suffixes=FP8)
    keys |= plain(
        "model.language_model.layers.", "2.eh_proj.weight 2.shared_head.norm.weight 0.self_attn.f_a_proj.weight"
    )
    keys |= plain("", "model.visual.blocks.0.mlp.gate_proj.weight")
    return {"model_type": "glm5_next", "text_config": {**ROUTED, "num_nextn_predict_layers": 1}}, keys


def qwen4_exp() -> tuple[dict[str, Any], Keys]:
    keys: Keys = {}
    for start in ("model.language_model.layers.0.", "model.language_model.layers.1.", "mtp.layers.0."):
        keys |= moe_keys(f"{start}mlp.", GUD, suffixes=FP8)
        keys |= plain(f"{start}mlp.", "shared_expert.gate_proj.weight shared_expert_gate.weight")
    keys |= {"model.language_model.layers.0.ple.embed.weight": ("F8_E4M3", [999, 32])}
    keys |= plain("model.language_model.layers.", "0.ple.gate.weight 1.hc_mlp.fn 1.self_attn.indexer.wk.weight")
    return {"model_type": "qwen4_exp", "text_config": {**PLAIN, "mtp_num_hidden_layers": 1}}, keys


def qwen3_5_moe() -> tuple[dict[str, Any], Keys]:
    keys: Keys = {}
    for start in ("model.language_model.layers.0.", "model.language_model.layers.1.", "mtp.layers.0."):
        keys |= moe_keys(f"{start}mlp.", STACK, suffixes=("",))
        keys |= plain(f"{start}mlp.", "shared_expert.gate_proj.weight shared_expert_gate.weight")
    keys |= plain("", "mtp.fc.weight model.visual.blocks.0.mlp.linear_fc1.weight")
    return {"model_type": "qwen3_5_moe", "text_config": {**PLAIN, "mtp_num_hidden_layers": 1}}, keys


def mimo_v2_flash() -> tuple[dict[str, Any], Keys]:
    keys = moe_keys("model.layers.1.mlp.", GUD, bias=BIAS, suffixes=FP8)
    keys |= plain(
        "model.", "layers.0.mlp.gate_proj.weight layers.1.self_attn.attention_sink_bias mtp.layers.0.mlp.up_proj"
    )
    return {"model_type": "mimo_v2", **ROUTED}, keys


def minimax_m2() -> tuple[dict[str, Any], Keys]:
    keys: Keys = {}
    for number in range(3):
        start = f"model.layers.{number}.block_sparse_moe."
        keys |= moe_keys(start, W123, bias="e_score_correction_bias", suffixes=FP8)
    return {"model_type": "minimax_m2", "num_mtp_modules": 1, **LOCAL}, keys | plain(
        "model.layers.2.", "eh_proj.weight"
    )


def minimax_m3_vl() -> tuple[dict[str, Any], Keys]:
    block = "language_model.model.layers.1.block_sparse_moe."
    keys = moe_keys(block, W123, bias="e_score_correction_bias", suffixes=FP8)
    keys |= plain(block, "shared_experts.gate_proj.weight shared_experts.gate_proj.weight_scale_inv")
    keys |= plain("", "language_model.model.layers.0.mlp.gate_proj.weight patch_merge_mlp.0.weight")
    return {"model_type": "minimax_m3_vl", "text_config": {**LOCAL, "model_type": "minimax_m3"}}, keys


def hy_v3() -> tuple[dict[str, Any], Keys]:
    keys: Keys = {}
    for number in range(3):
        start = f"model.layers.{number}.mlp."
        suffixes = ("weight", "weight_scale", "input_scale")
        keys |= moe_keys(start, GUD, router="router.gate.weight", bias="expert_bias", suffixes=suffixes)
        keys |= plain(start, "shared_mlp.gate_proj.weight shared_mlp.gate_proj.weight_scale")
    return {"model_type": "hy_v3", "num_nextn_predict_layers": 1, **PLAIN}, keys | plain(
        "model.layers.2.", "eh_proj.weight"
    )


def gemma4() -> tuple[dict[str, Any], Keys]:
    keys: Keys = {}
    for number in range(2):
        start = f"model.language_model.layers.{number}."
        keys |= moe_keys(start, STACK, router="router.proj.weight", bias="router.per_expert_scale", suffixes=("",))
        keys |= plain(start, "router.scale layer_scalar mlp.gate_proj.weight pre_feedforward_layernorm_2.weight")
    return {"model_type": "gemma4", "text_config": {**PLAIN, "top_k_experts": TOP_K}}, keys


def step3p7() -> tuple[dict[str, Any], Keys]:
    keys: Keys = {}
    for number in range(2):
        start = f"model.layers.{number}."
        keys |= moe_keys(f"{start}moe.", "gate_proj|up_proj|down_proj", bias="router_bias", suffixes=FP8)
        keys |= plain(start, "share_expert.gate_proj.weight self_attn.g_proj.weight")
    return {"model_type": "step3p5", **SIZES, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K}, keys


def bailing_hybrid() -> tuple[dict[str, Any], Keys]:
    keys: Keys = {}
    for number in range(3):
        keys |= moe_keys(f"model.layers.{number}.mlp.", GUD, bias="gate.expert_bias", suffixes=FP8)
    keys |= plain("model.layers.", "2.eh_proj.weight 0.attention.f_proj.weight 1.attention.dense.weight")
    groups = {"n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 1}
    return {"model_type": "bailing_hybrid", **groups, **PLAIN}, keys


PUBLISHED: Mapping[str, Callable[[], tuple[dict[str, Any], Keys]]] = {
    make.__name__: make
    for make in (
        deepseek_v4, deepseek_v41, kimi_k3, glm5_next, qwen4_exp, qwen3_5_moe, mimo_v2_flash, minimax_m2, minimax_m3_vl,
        hy_v3, gemma4, step3p7, bailing_hybrid,
    )
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """The checkpoint in three shards; ids of experts in tables are such."""
    config, keys = PUBLISHED[name]()
    rng = np.random.default_rng(0)
    tensors: Tensors = {}
    for key, (dtype, shape) in keys.items():
        tensors[key] = data(rng, dtype, shape)
        if key.endswith("tid2eid"):
            ids = np.array([rng.permutation(EXPERTS)[:TOP_K] for _ in range(shape[0])], "<i8")
            tensors[key] = dtype, shape, ids.tobytes()
    return synthetic.write(folder, config, tensors, shards=3, interleave=True)
