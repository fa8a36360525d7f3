"""Weights that go straight into stacked parameters are what transformers' own conversion makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.model import transformers_api
from moekern.model.reader import read_tensors
from moekern.model.transformers_api import Loader, open_loader

MakeCheckpoint = Callable[[str], Path]
CPU = torch.device("cpu")


def opened(folder: Path, dtype: torch.dtype) -> tuple[Loader, dict[str, Tensor], dict[str, Tensor]]:
    """A loader, the tensors of a layer's experts, and all others."""
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    experts = {tensor.name for tensor in next(iter(layout.layers.values())).of_role("expert")}
    tensors = read_tensors(checkpoint, checkpoint.tensors)
    loader = open_loader(folder, dtype, layout=layout)
    own = {name: value for name, value in tensors.items() if name in experts}
    return loader, own, {name: value for name, value in tensors.items() if name not in experts}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_are_those_of_the_conversion(
    name: str, dtype: torch.dtype, family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, experts, others = opened(family_checkpoint(name), dtype)
    assert loader.stacked(experts, CPU) == {}
    loader.load(others, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(transformers_api, "stacked", lambda model, tensors, *rest: dict(tensors))
        converted, *_ = opened(family_checkpoint(name), dtype)
        converted.load({**experts, **others}, CPU)
    for (key, got), (_, want) in zip(loader.model.named_parameters(), converted.model.named_parameters(), strict=True):
        assert (got.dtype, got.requires_grad) == (want.dtype, want.requires_grad), key
        assert torch.equal(got, want), key


@pytest.mark.parametrize("change", ["missing", "wide", "other"])
def test_what_is_not_all_there_is_left_to_the_conversion(change: str, family_checkpoint: MakeCheckpoint) -> None:
    loader, experts, _ = opened(family_checkpoint("qwen3_moe"), torch.float32)
    last = next(name for name in reversed(experts) if "up_proj" in name)
    weight = experts.pop(last)
    if change != "missing":
        experts[last if change == "wide" else "other"] = torch.cat([weight, weight])
    left = loader.stacked(experts, CPU)
    assert set(left) == {name for name in experts if "down_proj" not in name}
    assert all(parameter.is_meta for name, parameter in loader.model.named_parameters() if "gate_up" in name)
