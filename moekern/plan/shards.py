"""What tensor parallelism divides beside the experts' number: attention heads, and the width of an expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekern.architectures.config_keys import first, sections

HEADS = ("num_attention_heads", "n_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "kv_n_heads", "num_attention_groups")
WIDTH = ("moe_intermediate_size", "intermediate_size")  # the second where all layers have experts of that width

DTYPE = ("dtype", "torch_dtype")
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Shards:
    """Numbers that engines divide by tp; 0 where they are not known.

    heads, kv_heads: of attention; latent attention has one key for all heads, which no rank divides. width: of an
    expert's intermediate vector, its channels. block: of these as many share a scale. bytes: of a number in the type
    that config.json names; 2 where it names none.
    """

    heads: int = 0
    kv_heads: int = 0
    width: int = 0
    block: int = 0
    bytes: int = 2


def shards_of(config: Mapping[str, Any], holder: str) -> Shards:
    """The numbers of a config, which may lack any of them."""

    def number(*names: str) -> int:
        return max(first(config, names, holder) or 0, 0)

    heads = number(*HEADS)
    kv_heads = 0 if number("kv_lora_rank") else number(*KV_HEADS) or heads
    given = (section.get("quantization_config") for _, section in sections(config, holder))
    blocks = [each.get("weight_block_size") for each in given if isinstance(each, dict)]
    block = next((each[0] for each in blocks if isinstance(each, list) and each and type(each[0]) is int), 0)
    named = (section.get(key) for _, section in sections(config, holder) for key in DTYPE)
    size = next((BYTES[name] for name in named if isinstance(name, str) and name in BYTES), 2)
    return Shards(heads, kv_heads, number(WIDTH[0]) or number(WIDTH[1]), max(block, 0), size)


def heads_problem(shards: Shards, tp: int) -> str | None:
    """Why attention cannot be spread over so many ranks: each has whole heads, and whole key-value heads, or one of
    them that several ranks have a copy of."""
    if shards.heads % tp:
        return f"tp={tp} does not divide the {shards.heads} attention heads"
    if shards.kv_heads and (shards.kv_heads % tp if shards.kv_heads >= tp else tp % shards.kv_heads):
        return f"tp={tp} neither divides the {shards.kv_heads} key-value heads nor is a multiple of them"
    return None
