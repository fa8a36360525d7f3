"""What trains, by the names that people give it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moekern.errors import InputError
from moekern.recovery.settings import Training
from tests.helpers.recovering import steps

MakeCheckpoint = Callable[[str], Path]


def names(folder: Path, *kinds: str, targets: tuple[str, ...] = ("attention",)) -> set[str]:
    """Of layer 1, without their layer, and of what lies behind the layers."""
    with steps(folder, Training(train=kinds, kl=0.0, next=1.0, lora_targets=targets)) as own:
        return {one.name.split(".layers.1.")[-1] for one in own.trained.some if one.layer in (None, 1)}


ATTENTION = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"}
ROUTER = {"mlp.gate.weight"}
QK = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}


@pytest.mark.parametrize(
    ("kinds", "targets", "want"),
    [
        (("router",), (), ROUTER),
        (("norms",), (), NORMS | QK),
        (("experts",), (), EXPERTS),
        (("down",), (), {"mlp.experts.down_proj"}),
        (("scale",), (), {"mlp.experts.down_proj"}),
        (("lora",), ("attention",), ATTENTION),
        (("lora",), ("experts",), EXPERTS),
        (("lora",), ("linear",), ATTENTION | EXPERTS),
        (("router", "norms", "lora"), ("attention", "experts"), ROUTER | NORMS | QK | ATTENTION | EXPERTS),
        (("all",), (), ROUTER | NORMS | QK | ATTENTION | EXPERTS),
        (("all", "router", "norms"), (), ROUTER | NORMS | QK | ATTENTION | EXPERTS),
    ],
)
def test_kinds(
    kinds: tuple[str, ...], targets: tuple[str, ...], want: set[str], family_checkpoint: MakeCheckpoint
) -> None:
    assert names(family_checkpoint("qwen3_moe"), *kinds, targets=targets) == want


def test_routers_with_biases_shared_experts_and_latents(family_checkpoint: MakeCheckpoint) -> None:
    assert names(family_checkpoint("gpt_oss"), "bias") == {"mlp.router.bias"}
    assert names(family_checkpoint("gpt_oss"), "router") == {"mlp.router.weight", "mlp.router.bias"}
    deepseek = family_checkpoint("deepseek_v3")
    assert not any("shared" in name for name in names(deepseek, "experts") | names(deepseek, "down"))
    assert any("shared" in name for name in names(deepseek, "lora", targets=("linear",)))
    assert "model.norm.weight" in names(deepseek, "norms")
    assert "self_attn.kv_a_layernorm.weight" in names(deepseek, "norms")


def test_two_ways_at_once_are_refused_by_the_name_of_the_weight(family_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(InputError, match=r"down_proj cannot train in two ways at once"):
        names(family_checkpoint("qwen3_moe"), "down", "scale")
