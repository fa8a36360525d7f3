"""Widths of experts that engines run: each rule broken once, and what is said about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekern.plan.shards import Shards
from moekern.plan.widths import WIDTHS, Stored, multiple_of, width_cost, width_problem

HALF = Stored("qwen3_moe", "", Shards())
INT4 = replace(HALF, quantization="compressed-tensors/pack-quantized/group")
BLOCKS = Stored("qwen3_moe", "fp8", Shards(block=128))

BROKEN = {  # engine, ranks, experts, a width that breaks the rule, the nearest that do not
    "grouped product": ("transformers", 1, HALF, 700, "696 or 704"),
    "grouped product in float32": ("transformers", 1, replace(HALF, shards=Shards(bytes=4)), 702, "700 or 704"),
    "blocks of scales": ("vllm", 2, BLOCKS, 640, "512 or 768"),
    "activation": ("sglang", 2, HALF, 700, "696 or 704"),
    "marlin": ("vllm", 2, INT4, 704, "640 or 768"),
    "K-quants": ("llama.cpp", 1, HALF, 704, "512 or 768"),
    "groups of 64": ("mlx-lm", 1, HALF, 48, "64"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_every_rule_is_told_with_the_nearest_widths(case: str) -> None:
    engine, ranks, experts, width, near = BROKEN[case]
    told = [
        text
        for ask in (width_problem, width_cost)
        if (text := ask(engine, replace(experts, shards=replace(experts.shards, width=width)), ranks))
    ]
    assert len(told) == 1
    assert f"{width} channels" in told[0]
    assert told[0].endswith(f": {near}")
    for number in near.split(" or "):
        fits = replace(experts, shards=replace(experts.shards, width=int(number)))
        assert width_problem(engine, fits, ranks) is width_cost(engine, fits, ranks) is None


def test_no_rule_is_forgotten_here() -> None:
    broken = {
        i
        for engine, ranks, experts, width, _ in BROKEN.values()
        for i, rule in enumerate(WIDTHS)
        if engine in rule.engines and width // ranks % rule.multiple(experts)
    }
    assert broken == set(range(len(WIDTHS)))


def test_ranks_and_what_is_not_known() -> None:
    wide = replace(HALF, shards=Shards(width=1536))
    assert width_problem("vllm", wide, 5) == (
        "5 ranks do not divide an expert's 1536 channels; nearest width that runs: 1535 or 1540"
    )
    assert width_cost("vllm", wide, 5) is None
    assert width_problem("transformers", HALF) is None  # a width of 0 is none
    assert multiple_of("sglang", BLOCKS, 4) == 512
    assert width_problem("transformers", replace(BLOCKS, shards=Shards(width=100))) is None  # no product of torch's


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 20), ("bfloat16", 24), ("float32", 22), ("float32", 20)])
def test_the_rule_of_transformers_is_what_it_does(dtype: str, width: int) -> None:
    config = Qwen3MoeConfig(
        vocab_size=16, hidden_size=32, moe_intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, dtype))
    stored = Stored("qwen3_moe", "", Shards(width=width, bytes=2 if dtype == "bfloat16" else 4))
    with torch.no_grad():
        if width_problem("transformers", stored) is None:
            model(torch.arange(4)[None])
            return
        with pytest.raises(RuntimeError, match="16 bytes"):
            model(torch.arange(4)[None])
        model.set_experts_implementation("eager")
        model(torch.arange(4)[None])
