"""Parameters of a model in memory as the tensors that its checkpoint holds of them: transformers' conversion turned
round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError
from moekern.model.transformers_api import Loader, revert_weight_conversion

PLAIN = ("F32", "BF16", "F16")


def saved(loader: Loader, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name in the checkpoint -> numbers. `parameters` are all of a decoder layer, or others, by the model's names."""
    model = loader.model
    before = getattr(model, "_weight_conversions", None)
    model._weight_conversions = loader.mapping
    try:
        return dict(revert_weight_conversion(model, dict(parameters)))
    finally:
        model._weight_conversions = before


def check_saved(checkpoint: Checkpoint, loader: Loader, parameters: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raise InputError unless those of `parameters` (as `saved` has them, on any device) that are named can be written
    into the checkpoint: as plain numbers, under names and of shapes that it has."""
    wanted = set(names)
    found = saved(loader, {name: torch.empty_like(value, device="meta") for name, value in parameters.items()})
    own = {name: value for name, value in found.items() if loader.model_key(name) in wanted}
    missing = wanted - {loader.model_key(name) for name in own}
    if missing:
        raise InputError(f"{checkpoint.folder}: {min(missing)}: trained weights of it have no place in the checkpoint")
    for name, value in own.items():
        check_place(checkpoint, name, value)


def check_place(checkpoint: Checkpoint, name: str, value: Tensor) -> None:
    """Raise InputError unless the checkpoint has a tensor of plain numbers of this name and shape."""
    entry = checkpoint.tensors.get(name)
    if entry is None:
        raise InputError(f"{checkpoint.folder}: has no tensor {name}, where trained weights would go")
    if entry.dtype not in PLAIN:
        what = f"{name} is stored as {entry.dtype}, and trained weights are written as {', '.join(PLAIN)}"
        raise InputError(f"{checkpoint.folder}: {what}; train what is stored so (--train router, norms, bias)")
    if entry.shape != tuple(value.shape):
        made = f"{list(value.shape)} where it is trained"
        raise InputError(f"{checkpoint.folder}: {name} has shape {list(entry.shape)}, and {made}")
