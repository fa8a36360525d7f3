"""Checkpoints that are headers only: the data part is a hole in a sparse file, so sizes may be those of real models."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moekern.architectures import Layout, find_layout
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.checkpoint.header import DTYPE_BITS

GUD, W123, STACK = "experts.#.gate_proj|up_proj|down_proj", "experts.#.w1|w2|w3", "experts.gate_up_proj|down_proj"
BIAS = "gate.e_score_correction_bias"

Spec = Mapping[str, tuple[str, Sequence[int]]]  # key -> safetensors dtype and shape


def header_of(tensors: Spec, metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """Length and JSON of a header, and the size in bytes of the data part that it describes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata is not None else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text, end


def write_shard(path: Path, tensors: Spec, metadata: Mapping[str, str] | None = None) -> None:
    header, size = header_of(tensors, metadata)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Spec, shards: int = 1) -> Path:
    """A folder with config.json and one file, or an index and several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_shard(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for i in range(shards):
        part = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[i::shards]
        write_shard(folder / part, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def moe_keys(
    prefix: str,
    experts: str,
    router: str = "gate.weight",
    bias: str = "",
    *,
    num_experts: int = 8,
    suffixes: Sequence[str] = ("weight",),
    trailing: int = 0,
) -> dict[str, tuple[str, list[int]]]:
    """Keys of one block: `experts` such as "experts.#.w1|w2|w3"; without "#" the experts are stacked on axis 0.

    An empty suffix leaves the projection's name as it is, one that begins with "_" is a part of it.
    """
    head, _, last = experts.rpartition(".")
    names = [f"{head}.{name}" if head else name for name in last.split("|")]
    keys: dict[str, tuple[str, list[int]]] = {}
    for name in names:
        for suffix in suffixes:
            full = f"{prefix}{name}.{suffix}" if suffix and suffix[0] != "_" else f"{prefix}{name}{suffix}"
            if "#" in name:
                keys |= {full.replace("#", str(e)): ("BF16", [16, 32]) for e in range(num_experts)}
            else:
                keys[full] = ("BF16", [num_experts, 16, 32])
    keys[prefix + router] = ("BF16", [num_experts + trailing, 32])
    if bias:
        keys[prefix + bias] = ("F32", [num_experts + trailing])
    return keys


def layout_of(folder: Path) -> tuple[Checkpoint, Layout]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, find_layout(checkpoint)
