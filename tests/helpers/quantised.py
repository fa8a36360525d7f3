"""Checkpoints of a family, written anew with quantised weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 16


def rewrite(source: Path, target: Path, change: Callable[[str, Tensor], dict[str, Tensor]], **config: Any) -> Path:
    """One shard with every tensor of `source` changed, and config.json with `config` added."""
    target.mkdir()
    tensors: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            tensors |= change(name, tensor)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    before = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**before, "dtype": "bfloat16", **config}))
    return target


def _bfloat16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _fp8_blocks(name: str, tensor: Tensor, block: int) -> dict[str, Tensor]:
    """Projections as float8_e4m3 with a scale for every block, other tensors as bfloat16."""
    if not name.endswith("_proj.weight") and ".experts." not in name:
        return {name: _bfloat16(tensor)}
    rows, columns = (-(-n // block) for n in tensor.shape)
    padded = torch.zeros(rows * block, columns * block)
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor
    blocks = padded.view(rows, block, columns, block)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).reshape(padded.shape)[: tensor.shape[0], : tensor.shape[1]]
    return {name: values.to(torch.float8_e4m3fn).contiguous(), f"{name}_scale_inv": scale}


def fp8(source: Path, target: Path, block: int = BLOCK) -> Path:
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": ["lm_head"],
    }
    change = lambda name, tensor: _fp8_blocks(name, tensor, block)  # noqa: E731
    return rewrite(source, target, change, quantization_config=quantization)


def mxfp4(source: Path, target: Path, width: int = 32) -> Path:
    """gpt-oss with random 4-bit experts of intermediate size `width`: blocks [E, out, in / 32, 16] and scales."""
    generator = torch.Generator().manual_seed(0)

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name.endswith("gate_up_proj_bias"):
            return {name: torch.randn(8, 2 * width, generator=generator).bfloat16()}
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: _bfloat16(tensor)}
        out, groups = (2 * width, 1) if "gate_up" in name else (32, width // 32)
        return {
            f"{name}_blocks": torch.randint(256, (8, out, groups, 16), generator=generator, dtype=torch.uint8),
            f"{name}_scales": torch.randint(121, 125, (8, out, groups), generator=generator, dtype=torch.uint8),
        }

    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]}
    return rewrite(source, target, change, intermediate_size=width, quantization_config=quantization)
