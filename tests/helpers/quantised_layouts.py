"""Quantised layouts of experts, tensor by tensor."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np

from moekern.checkpoint.header import DTYPE_BITS
from tests.helpers.synthetic import Tensors, qwen3, shard_bytes

EXPERTS = 8

# What stands behind a projection of 48 x 64 (out x in), blocks and groups of 16 or 32, as each quantiser writes it.
LAYOUTS: dict[str, dict[str, tuple[str, list[int]]]] = {
    "fp8_block": {"weight": ("F8_E4M3", [48, 64]), "weight_scale_inv": ("F32", [3, 4])},
    "fp8_block_e8m0": {"weight": ("F8_E4M3", [48, 64]), "scale": ("F8_E8M0", [3, 4])},
    "fp8_static": {"weight": ("F8_E4M3", [48, 64]), "weight_scale": ("F32", []), "input_scale": ("F32", [])},
    "fp8_channel": {"weight": ("F8_E4M3", [48, 64]), "weight_scale": ("BF16", [48, 1])},
    "fp8_e5m2": {"weight": ("F8_E5M2", [48, 64]), "weight_scale": ("F32", [1])},
    "int8": {"weight": ("I8", [48, 64]), "weight_scale": ("F32", [48, 1])},
    "gptq": {
        "qweight": ("I32", [8, 48]), "qzeros": ("I32", [2, 6]), "scales": ("F16", [2, 48]), "g_idx": ("I32", [64]),
    },
    "gptq_bias": {
        "qweight": ("I32", [8, 48]), "qzeros": ("I32", [2, 6]), "scales": ("F16", [2, 48]), "bias": ("F16", [48]),
    },
    "awq": {"qweight": ("I32", [64, 6]), "qzeros": ("I32", [2, 6]), "scales": ("F16", [2, 48])},
    "compressed_int4": {
        "weight_packed": ("I32", [48, 8]), "weight_scale": ("BF16", [48, 2]), "weight_zero_point": ("I32", [6, 2]),
        "weight_shape": ("I64", [2]), "weight_g_idx": ("I32", [64]),
    },
    "compressed_nvfp4": {
        "weight_packed": ("U8", [48, 32]), "weight_scale": ("F8_E4M3", [48, 4]), "weight_global_scale": ("F32", [1]),
        "input_global_scale": ("F32", [1]),
    },
    "modelopt_nvfp4": {
        "weight": ("U8", [48, 32]), "weight_scale": ("F8_E4M3", [48, 4]), "weight_scale_2": ("F32", []),
        "input_scale": ("F32", []),
    },
    "mxfp4_indexed": {"weight_packed": ("U8", [48, 32]), "weight_scale": ("U8", [48, 2])},
    "f4": {"weight": ("F4", [48, 64]), "weight_scale": ("F8_E8M0", [48, 2])},
    "odd": {"weight": ("U8", [5, 7]), "weight_scale": ("F32", []), "weight_shape": ("I64", [2]), "g_idx": ("I32", [0])},
}  # fmt: skip

INDEXED = re.compile(r"model\.layers\.(\d)\.mlp\.experts\.(\d)\.(.*)")


def indexed(layout: str) -> tuple[dict, Tensors]:
    """A qwen3_moe checkpoint in that layout, with an empty tensor beside the experts."""
    config, plain = qwen3()
    rng = np.random.default_rng(1)
    tensors: Tensors = {"model.empty": ("BF16", [0, 4], b"")}
    for name, tensor in plain.items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        for suffix, (dtype, shape) in LAYOUTS[layout].items():
            tensors[f"{name.removesuffix('weight')}{suffix}"] = (
                dtype,
                shape,
                rng.bytes(math.prod(shape) * DTYPE_BITS[dtype] // 8),
            )
    return config, tensors


def write_spread(folder: Path, config: dict, tensors: Tensors, shards: int, pad: int) -> Path:
    """Tensors dealt out one by one, so that the parts of one expert lie in different shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        held = {name: tensors[name] for name in part}
        (folder / file).write_bytes(shard_bytes(held, {"format": "pt", "part": str(i)}, pad))
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
