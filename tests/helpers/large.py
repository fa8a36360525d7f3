"""Random checkpoints whose layers have the shape of Qwen3-30B-A3B's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

HIDDEN, INTERMEDIATE, HEADS, KEYS, HEAD = 2048, 768, 32, 4, 128
WIDE = (INTERMEDIATE, HIDDEN)
VOCAB, LAYERS, TOP_K = 256, 2, 8


def save(folder: Path, experts: int) -> Path:
    """The folder, with a model of so many experts a layer in it: a shard for each layer, bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEYS, head_dim=HEAD, num_experts=experts,
        num_experts_per_tok=TOP_K, norm_topk_prob=True, max_position_embeddings=4096,
        architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    ends = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "lm_head.weight": matrix(VOCAB, HIDDEN)}
    place = {}

    def write(tensors: dict[str, Tensor], i: int) -> None:
        shard = f"model-{i + 1:05d}-of-{LAYERS + 1:05d}.safetensors"
        save_file(tensors, folder / shard)
        place.update(dict.fromkeys(tensors, shard))

    write(ends | {"model.norm.weight": torch.ones(HIDDEN).bfloat16()}, LAYERS)
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        tensors = {
            f"{prefix}{name}.weight": torch.ones(size).bfloat16()
            for name, size in (
                ("input_layernorm", HIDDEN),
                ("post_attention_layernorm", HIDDEN),
                ("self_attn.q_norm", HEAD),
                ("self_attn.k_norm", HEAD),
            )
        }
        tensors[f"{prefix}self_attn.q_proj.weight"] = matrix(HEADS * HEAD, HIDDEN)
        tensors[f"{prefix}self_attn.k_proj.weight"] = matrix(KEYS * HEAD, HIDDEN)
        tensors[f"{prefix}self_attn.v_proj.weight"] = matrix(KEYS * HEAD, HIDDEN)
        tensors[f"{prefix}self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD)
        tensors[f"{prefix}mlp.gate.weight"] = matrix(experts, HIDDEN)
        for name, shape in (("gate", WIDE), ("up", WIDE), ("down", WIDE[::-1])):
            base = matrix(*shape)
            for e in range(experts):  # rows of one matrix in other places: numbers are dear to draw
                tensors[f"{prefix}mlp.experts.{e}.{name}_proj.weight"] = base.roll(7 * e + 1, 0)
        write(tensors, i)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return folder
