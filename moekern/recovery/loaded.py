"""A model opened to be trained: what memory its layers, what trains of them, and hidden states share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from torch import nn

from moekern.architectures import find_layout
from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError
from moekern.files import scratch, sized
from moekern.model.compute import Compute
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.recovery.selection import Chosen, check_adapter, check_written, chosen
from moekern.recovery.settings import Training
from moekern.recovery.trained import Trained, bytes_trained

SHARE = 2  # of what is left beside a layer, one part in so many for what trains, and of the rest for layers that stay


@dataclass(frozen=True)
class Ready:
    """trained: what trains, with nothing in it yet. described: what lies where, for people."""

    layerwise: LayerwiseModel
    trained: Trained
    described: str


@contextmanager
def trainable(
    checkpoint: Checkpoint, compute: Compute, training: Training
) -> Iterator[tuple[LayerwiseModel, list[Chosen]]]:
    """A model and what trains of it. Raises InputError for what cannot be trained, or not written."""
    layout = find_layout(checkpoint)
    if layout.family.no_gradient:
        raise InputError(f"recover: {layout.family.name} cannot be trained: {layout.family.no_gradient}")
    with open_layerwise(checkpoint, layout, compute, compute.team) as layerwise:
        layerwise.model.requires_grad_(False)
        some = chosen(layerwise, training)
        if training.adapter:
            check_adapter(layerwise.model, some)
        if not training.adapter or training.factored:
            check_written(checkpoint, layerwise.loader, layerwise.layers_name, layerwise.layers, some)
        if layerwise.groups.cuts:
            raise layerwise.takes.refusal("layers that are run in groups of experts are not trained")
        yield layerwise, some


@contextmanager
def ready(checkpoint: Checkpoint, compute: Compute, training: Training) -> Iterator[Ready]:
    """The same with room for what trains. Raises InputError as `trainable` does, and where the disk has none."""
    with trainable(checkpoint, compute, training) as (layerwise, some), _paged(layerwise, some) as folder:
        inside = folder is None
        there = staying(layerwise, bytes_trained(some) if inside else 0)
        where = "in memory" if inside else f"in files in {folder and folder.parent}"
        layers = sum(_bytes(layer) for layer in layerwise.layers)
        of_layers = f"all layers in memory ({sized(layers)})" if there.stays else "one layer in memory at a time"
        numbers = sum(prod(one.shape) for one in some)
        said = f"{numbers} weights train, {sized(bytes_trained(some))} {where} for them; {of_layers}"
        yield Ready(there, Trained(there, some, training, folder), said)


def staying(layerwise: LayerwiseModel, taken: int = 0) -> LayerwiseModel:
    """The same with all layers in memory from pass to pass where there is room, of which so many bytes are `taken`."""
    room, layers = layerwise.takes.room - taken, sum(_bytes(layer) for layer in layerwise.layers)
    on_gpu = layerwise.takes.budget.gpu
    free = room if on_gpu is None else on_gpu - layerwise.takes.on_device
    stays = layers <= free // SHARE
    left = room - (layers if stays and on_gpu is None else 0)
    return _with_room(layerwise, max(0, left), stays=stays)


def all_staying(layerwise: LayerwiseModel, what: str) -> LayerwiseModel:
    """The same with all layers in memory, as `what` needs it. Raises InputError where there is no room."""
    found = staying(layerwise)
    if not found.stays or found.groups.cuts:
        size = sized(sum(map(_bytes, found.layers)))
        raise found.takes.refusal(f"{what}, which needs all layers in memory, {size}, and as much again")
    return found


def _bytes(layer: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters())


@contextmanager
def _paged(layerwise: LayerwiseModel, some: list[Chosen]) -> Iterator[Path | None]:
    """A folder for what trains; None where memory has room for it."""
    if bytes_trained(some) <= layerwise.takes.room // SHARE:
        yield None
        return
    with scratch(layerwise.spill or tempfile.gettempdir(), "recover") as folder:
        yield folder


def _with_room(layerwise: LayerwiseModel, room: int, *, stays: bool) -> LayerwiseModel:
    """The same with less room for hidden states."""
    budget = layerwise.takes.budget
    less = replace(budget, host=max(0, budget.host - (layerwise.takes.room - room)))
    return replace(layerwise, takes=replace(layerwise.takes, budget=less), stays=stays)
