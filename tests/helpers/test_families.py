"""The tiny checkpoints are what the other tests take them for: reloadable, finite, routed and reproducible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import families


@pytest.mark.parametrize("name", families.FAMILIES)
def test_reloads_to_the_same_logits(name: str, tmp_path: Path) -> None:
    folder = families.save(name, tmp_path, seed=1)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, info = families.load(folder, loading_info=True)
    assert not any(info.values()), info
    ids = families.input_ids(name)
    logits = families.forward(model, ids)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, families.forward(families.build(name, seed=1), ids))


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
