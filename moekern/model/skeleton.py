"""What lies outside of the decoder layers, filled once and resident: embeddings, the last norm, the head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moekern.errors import InputError
from moekern.model.reader import LayerReader, read_tensors

if TYPE_CHECKING:
    from moekern.model.layerwise import LayerwiseModel


def fill_skeleton(model: LayerwiseModel, keys: Iterable[str]) -> None:
    """Read these tensors; ranks of a node read them once. Raises InputError for what the checkpoint lacks."""
    if model.team.local_size == 1:
        model.loader.load(read_tensors(model.checkpoint, keys), model.device)
    else:
        with LayerReader(model.checkpoint, [keys], torch.device("cpu"), team=model.team) as once:
            once.start(0)
            model.loader.load(once.take(), model.device)
            once.release(model.model)
    module: Any = model.model
    module.tie_weights()
    inside = model.layers_name + "."
    for name, parameter in module.named_parameters():
        if parameter.is_meta and not name.startswith(inside):
            raise InputError(f"{model.checkpoint.folder}: no tensor for the model's {name}")
    _move_buffers(module, model.device)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to(device)
