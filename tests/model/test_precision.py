"""The type that layers are computed in where nobody names one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern.architectures import find_layout
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.errors import InputError
from moekern.model import precision as module
from moekern.model.budget import Budget
from moekern.model.compute import Compute
from moekern.model.precision import is_slow, precision, settled
from moekern.model.sizes import sizes_of

MakeCheckpoint = Callable[[str], Path]
CPU = Compute(device="cpu")


@pytest.fixture
def stored(family_checkpoint: MakeCheckpoint) -> Callable[..., Checkpoint]:
    """The tiny Qwen3-MoE, with other words in its config."""
    checkpoint = open_checkpoint(family_checkpoint("qwen3_moe"))

    def make(**config: Any) -> Checkpoint:
        plain = {key: value for key, value in checkpoint.config.items() if key not in ("dtype", "torch_dtype")}
        return replace(checkpoint, config={**plain, **config})

    return make


def slow(monkeypatch: pytest.MonkeyPatch, free: int, capability: str = "AVX2") -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(module, "budget_of", lambda compute: Budget(free))


def test_a_slow_cpu_computes_in_float32_where_that_has_room(
    stored: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = stored(dtype="bfloat16")
    layout = find_layout(checkpoint)
    sizes = sizes_of(checkpoint, layout)
    needed = 4 * (sizes.skeleton.weights + sizes.largest.weights) + sizes.largest.stored
    slow(monkeypatch, needed)
    found = precision(CPU, checkpoint, layout)
    assert found.described == "in float32 (this CPU computes bfloat16 slowly)"
    assert settled(CPU, checkpoint, layout) == replace(CPU, dtype="float32")
    slow(monkeypatch, needed - 1)
    found = precision(CPU, checkpoint, layout)
    assert found.name == "bfloat16"
    assert "slow on this CPU, but float32 takes" in found.why
    slow(monkeypatch, needed, "AVX512")
    assert precision(CPU, checkpoint, layout).described == "in bfloat16"


def test_what_is_named_and_what_a_gpu_computes_is_left_alone(
    stored: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = stored(dtype="bfloat16")
    layout = find_layout(checkpoint)
    slow(monkeypatch, 1 << 60)
    for named in ("bfloat16", torch.bfloat16):
        compute = Compute(device="cpu", dtype=named)
        assert settled(compute, checkpoint, layout) is compute
    assert settled(Compute(device="cuda:0"), checkpoint, layout).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "float32"),
        ({"torch_dtype": "half"}, "float16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}, "float32"),
    ],
)
def test_the_checkpoints_type_is_the_configs(
    config: dict[str, Any], name: str, stored: Callable[..., Checkpoint]
) -> None:
    checkpoint = stored(**config)
    assert module.stored_dtype(checkpoint, find_layout(stored())) == name


@pytest.mark.parametrize("word", ["bfloat17", "int8", "nn", 16])
def test_a_type_that_config_json_cannot_mean_is_refused(word: object, stored: Callable[..., Checkpoint]) -> None:
    checkpoint = stored(dtype=word)
    with pytest.raises(InputError, match=r"config.json: dtype is .*, expected one such as bfloat16"):
        settled(CPU, checkpoint, find_layout(stored()))


def test_types_that_a_cpu_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    for supported in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: supported, raising=False)  # noqa: B023
        assert is_slow("float16") is not supported
    for capability, expected in (("DEFAULT", True), ("AVX2", True), ("AVX512", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)  # noqa: B023
        assert is_slow("bfloat16") is expected
        assert not is_slow("float32")
