"""What training made, as tensors of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from moekern.checkpoint.writing import write_tensors
from moekern.errors import InputError
from moekern.files import write_bytes
from moekern.model.finite import all_finite
from moekern.model.reader import DTYPES
from moekern.model.requantised import as_stored
from moekern.model.saved import places, saved
from moekern.recovery.selection import named
from moekern.recovery.trained import Trained


def write_trained(trained: Trained, folder: Path) -> int:
    """Write what changes, by its names in the checkpoint and in its types, a file for each layer; of several ranks the
    first writes. Returns how many tensors there are. Raises InputError for numbers that the checkpoint's types cannot
    hold."""
    layerwise, count = trained.layerwise, 0
    first = layerwise.team.first
    layers = sorted({one.layer for one in trained.some if one.layer is not None})
    for i in layerwise.visit(layers):
        own = named(layerwise.layers_name, i, layerwise.layers[i])
        count += _write(trained, i, own, folder / f"layer-{i:05d}.safetensors") if first else 0
    behind = {one.name: layerwise.model.get_parameter(one.name) for one in trained.of_layer(None)}
    return count + (_write(trained, None, dict(behind), folder / "behind.safetensors") if behind and first else 0)


def write_adapter(trained: Trained, folder: Path) -> int:
    """Write the matrices of low rank as an adapter of peft's (adapter_config.json, adapter_model.safetensors), whose
    names go from the model of transformers that the checkpoint is loaded as. Returns how many matrices there are."""
    if not trained.layerwise.team.first:
        return 0
    tensors, modules = {}, []
    for one in trained.some:
        module = one.name.removesuffix(".weight")
        modules.append(module)
        for part, name, _ in one.values():
            tensors[f"base_model.model.{module}.{part}.weight"] = as_stored(trained.numbers["value", name])
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(trained.layerwise.checkpoint.folder),
        "r": trained.training.lora_rank,
        "lora_alpha": trained.training.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    write_bytes(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
    return len(tensors)


def _write(trained: Trained, layer: int | None, parameters: dict[str, Tensor], path: Path) -> int:
    names = {one.name for one in trained.of_layer(layer)}
    made = {name: value.detach().cpu() for name, value in parameters.items()} | trained.made(layer)
    loader, checkpoint = trained.layerwise.loader, trained.layerwise.checkpoint
    tensors: dict[str, Tensor] = {}
    changed = places(checkpoint, loader, parameters, names)
    for name, value in saved(loader, made).items():
        if name not in changed:
            continue
        own = value.to("cpu", DTYPES[checkpoint.tensors[name].dtype]).contiguous()
        if not all_finite(own):
            raise InputError(
                f"recover: {name}: became numbers that {own.dtype} cannot hold; a lower --rate may mend it"
            )
        tensors[name] = own
    if trained.layerwise.team.first:
        write_tensors(path, {name: as_stored(value) for name, value in tensors.items()}, {})
    return len(tensors)
