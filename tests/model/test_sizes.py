"""Sizes of skeleton and layers, from headers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moekern.architectures import find_layout
from moekern.architectures.config_keys import LAYER_KEYS, first
from moekern.checkpoint.folder import open_checkpoint
from moekern.checkpoint.header import TensorEntry
from moekern.model.sizes import Size, size_of, sizes_of

MakeCheckpoint = Callable[[str], Path]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "jamba", "qwen3_vl_moe"])
def test_skeleton_and_layers_are_all_tensors_but_those_of_mtp(name: str, family_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(family_checkpoint(name))
    layout = find_layout(checkpoint)
    sizes = sizes_of(checkpoint, layout)
    held = [e.nbytes for e in checkpoint.tensors.values() if not e.name.startswith(layout.mtp_prefixes or ("-",))]
    assert sum(sizes.layers.values(), sizes.skeleton) == Size(sum(held), sum(held) // 4)  # all are float32
    assert list(sizes.layers) == list(range(first(checkpoint.config, LAYER_KEYS, layout.family.holder) or 0))
    assert sizes.largest.weights == max(size.weights for size in sizes.layers.values())


def entry(name: str, dtype: str, *shape: int, nbytes: int) -> TensorEntry:
    return TensorEntry(name, dtype, shape, "", 0, nbytes)


def test_weights_of_quantised_tensors_are_what_they_become() -> None:
    assert size_of(entry("a.weight", "F8_E4M3", 4, 8, nbytes=32)) == Size(32, 32)
    assert size_of(entry("a.weight_scale_inv", "F32", 1, 1, nbytes=4)) == Size(4, 0)
    assert size_of(entry("a.gate_up_proj_blocks", "U8", 2, 4, 8, nbytes=64)) == Size(64, 128)
    assert size_of(entry("a.weight_packed", "I32", 4, 2, nbytes=32)) == Size(32, 64)
