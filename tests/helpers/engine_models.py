"""Tiny random checkpoints as published ones look to engines: sizes that their kernels take, keys of the hub's configs,
a tokenizer."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers import families

VOCAB, LENGTH = 320, 64
PROMPTS = ([20, 33, 41, 57, 90, 111, 18], [200, 150, 60, 25, 31])  # token ids, none of them special
NEW_TOKENS = 12
# vLLM's CPU kernels take heads of 32 channels and, of latent attention, 512 + 64; windows hold all of the text.
SIZES: Mapping[str, Any] = {
    "hidden_size": 128, "head_dim": 32, "vocab_size": VOCAB, "max_position_embeddings": LENGTH,
    "moe_intermediate_size": 64, "intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64, "kv_lora_rank": 512, "q_lora_rank": 64, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64, "v_head_dim": 64, "sliding_window": LENGTH,
}  # fmt: skip
# llama.cpp takes every fourth layer for one of full attention.
LINEAR = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
# What a family needs beyond these sizes.
MORE: Mapping[str, Mapping[str, Any]] = {
    "ernie4_5_moe": {"intermediate_size": 128},
    "llama4_text": {"attention_chunk_size": LENGTH, "intermediate_size_mlp": 64},
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), LINEAR),
    "olmoe": {"num_key_value_heads": 4},
}
# Keys of published config.json files that transformers 5 does not write, and engines read.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {"scoring_func": "softmax"},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "exaone_moe": {"scoring_func": "sigmoid"},
    "glm4_moe": {"head_dim": 32},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True, "qk_norm_type": "per_layer"},
}


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the family's checkpoint in float32, with a tokenizer."""
    sizes = {**SIZES, **MORE.get(name, {})}
    families.save(name, folder, seed, config=functools.partial(families.configured, name, **sizes))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | PUBLISHED.get(name, {}), indent=2))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token a byte, 16 special ones and two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*(f"<s{i}>" for i in range(16)), *alphabet, "Ġt", "he"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s1>", "eos_token": "<s2>", "unk_token": "<s3>", "pad_token": "<s0>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
