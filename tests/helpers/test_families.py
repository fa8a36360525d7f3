"""The tiny checkpoints are what the other tests take them for: reloadable, finite, routed and reproducible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import families, in_flight
from tests.helpers.pairwise import thirds


@pytest.mark.parametrize("name", thirds(list(families.FAMILIES), 0))
def test_reloads_to_the_same_logits(
    name: str, family_checkpoint: Callable[[str], Path], whole_model: Callable[[str], Any]
) -> None:
    """The model that the family's tests share has all its weights from the files; a second one is built alike."""
    assert len(list(family_checkpoint(name).glob("*.safetensors"))) > 1
    ids = families.input_ids(name)
    logits = families.forward(whole_model(name), ids)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, families.forward(families.build(name), ids))


def test_a_shared_model_that_a_test_changes_is_found_out() -> None:
    model = families.build("mixtral")
    before = in_flight.state(model)
    families.forward(model, families.input_ids("mixtral"))
    assert in_flight.differences(before, in_flight.state(model)) == []
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda *args: None)
    layer.mlp.gate.weight.data[0] = 0
    layer.mlp.number = 8
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    assert in_flight.differences(before, in_flight.state(model)) == [
        "gradient lm_head.weight", "module model.layers.1", "module model.layers.1.mlp",
        "tensor model.layers.1.mlp.gate.weight",
    ]  # fmt: skip


def test_seed_decides_the_weights() -> None:
    first, again, other = (families.build("mixtral", seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "minimax_m2"])
def test_router_parameters_are_random(name: str) -> None:
    state = families.build(name).state_dict()
    constant = [key for key, value in state.items() if value.numel() > 1 and (value == value.flatten()[0]).all()]
    assert not constant


def test_special_names_exist() -> None:
    for table in (families.NO_STANDARD_HOOK, families.RESAVED, families.SEVERAL_STACKS):
        assert set(table) <= set(families.FAMILIES)
    assert not set(families.UNBUILDABLE) & set(families.FAMILIES)
