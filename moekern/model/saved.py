"""Parameters of a model in memory as the tensors that its checkpoint holds of them: transformers' conversion turned
round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moekern.architectures.quantisation import quantisation_of
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.strict_json import shown
from moekern.errors import InputError
from moekern.model.transformers_api import Loader, turned_back

PLAIN = ("F32", "BF16", "F16")


def saved(loader: Loader, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name in the checkpoint -> numbers. `parameters` are all of a decoder layer, or others, by the model's names.

    The loader must have been asked for the names of all of the checkpoint's tensors, as a layerwise model's has: what
    was turned on the way in is turned back, and nothing else.
    """
    model = loader.model
    before = getattr(model, "_weight_conversions", None)
    model._weight_conversions = [each for each in loader.mapping if each.was_used()]
    try:
        return dict(turned_back(model, dict(parameters)))
    finally:
        model._weight_conversions = before


def places(checkpoint: Checkpoint, loader: Loader, parameters: Mapping[str, Tensor], names: Iterable[str]) -> set[str]:
    """The checkpoint's tensors that hold those of `parameters` (as `saved` has them, on any device) that are named.

    Raises InputError unless all of them hold plain numbers, and are of the shapes that the model makes.
    """
    wanted = set(names)
    types = {name: torch.float64 if name in wanted else torch.float32 for name in parameters}  # which joining keeps
    found = saved(loader, {n: torch.empty(p.shape, dtype=types[n], device="meta") for n, p in parameters.items()})
    own = {name: value for name, value in found.items() if value.dtype == torch.float64}
    for name, value in own.items():
        check_place(checkpoint, name, value)
    return set(own)


def check_place(checkpoint: Checkpoint, name: str, value: Tensor) -> None:
    """Raise InputError unless the checkpoint has a tensor of plain numbers of this name and shape."""
    entry = checkpoint.tensors.get(name)
    method = quantisation_of(checkpoint.config).get("quant_method")
    if entry is None and method is None:
        raise InputError(f"{checkpoint.folder}: has no tensor {name}, where trained weights would go")
    if entry is None or entry.dtype not in PLAIN:
        stored = f"as {entry.dtype}" if entry is not None else f"in the format of {shown(method)}"
        what = f"{name} is stored {stored}, and trained weights are written as {', '.join(PLAIN)}"
        raise InputError(f"{checkpoint.folder}: {what}; train what is stored so (--train router, norms, bias)")
    if entry.shape != tuple(value.shape):
        made = f"{list(value.shape)} where it is trained"
        raise InputError(f"{checkpoint.folder}: {name} has shape {list(entry.shape)}, and {made}")
