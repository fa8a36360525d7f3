"""What a refit leaves, of chosen bytes: a folder with a file for each layer, and the plan that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.plan.document import Plan
from moekern.pruning.prune import prune
from moekern.pruning.refitted import write_layer
from tests.helpers.synthetic import Tensors, data, read, read_shard, shard_bytes

RECIPE = "5" * 64
DOWN = ("down_proj", "w2.weight")


def refit(
    source: Path,
    plan: Plan,
    folder: Path,
    *,
    dtype: str = "",
    parts: tuple[str, ...] = DOWN,
    layers: tuple[str, ...] = (),
) -> Plan:
    """Write other bytes for what has one of `parts` in its name, of every kept expert of `layers` (of all, where there
    are none); the plan that says so."""
    checkpoint = open_checkpoint(source)
    plain = folder.with_name(f"{folder.name}-plain")
    prune(source, plan, plain)
    tensors, rng, told = read(plain), np.random.default_rng(1), {}
    for key in layers or plan.layers:
        prefix = find_layout(checkpoint).layers[key].prefix
        new: dict[str, Any] = {
            name: finite(data(rng, dtype or kind, shape))
            for name, (kind, shape, _) in tensors.items()
            if name.startswith(prefix) and "shared" not in name and any(part in name for part in parts)
        }
        folder.mkdir(exist_ok=True)
        write_layer(folder, key, new, recipe=RECIPE, kept=plan.layers[key], model=checkpoint.fingerprint)
        told[key] = {"error": 0.25}
    return replace(plan, provenance={**plan.provenance, "refit": {"recipe": RECIPE, "layers": told}})


def finite(tensor: tuple[str, list[int], bytes]) -> tuple[str, list[int], bytes]:
    """Random bytes of narrow floats with a bit of their exponent cleared."""
    dtype, shape, raw = tensor
    return (dtype, shape, bytes(byte & 0x77 for byte in raw)) if dtype[:2] == "F8" or dtype == "F16" else tensor


def computed(folder: Path) -> Tensors:
    """The tensors of a refit's folder."""
    return {
        name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in read_shard(path)[0].items()
    }


def spoil(path: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> None:
    """Change the tensors of a refitted layer, or what its metadata say."""
    tensors, header = read_shard(path)
    said = json.loads(header["__metadata__"]["moekern"])
    change(tensors, said)
    path.write_bytes(shard_bytes(tensors, {"moekern": json.dumps(said)}))
