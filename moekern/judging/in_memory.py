"""A transformers model in memory seen as the checkpoint that it would be saved as: its layout, and what tells it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import TensorEntry
from moekern.errors import InputError, first_line
from moekern.model.reader import DTYPES
from moekern.model.transformers_api import Loader, turned_back

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def checkpoint_of(loader: Loader) -> Checkpoint:
    """Names, types and shapes of the tensors that the model would be saved as, and its configuration; no file is there.

    Bytes can be read of tensors that the model holds as a checkpoint does, which routers are. Raises InputError for a
    model that cannot be seen so.
    """
    model = loader.model
    kind = type(model).__name__
    state: dict[str, Tensor] = dict(model.state_dict())
    try:
        config = json.loads(model.config.to_json_string(use_diff=False))
        empty = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in state.items()}
        found = dict(turned_back(model, empty))
    except Exception as error:  # transformers' own conversion, of whatever model
        raise InputError(f"{kind}: its weights have no names of a checkpoint: {first_line(error)}") from error
    entries = {}
    for name, value in found.items():
        if value.dtype not in NAMES:
            raise InputError(f"{kind}: {name}: {value.dtype} is no type of a checkpoint")
        entries[name] = TensorEntry(name, NAMES[value.dtype], tuple(value.shape), "", 0, value.nbytes)

    def read(path: Path, entry: TensorEntry, start: int, size: int) -> bytes:
        held = state.get(loader.model_key(entry.name) or "")
        if held is None or tuple(held.shape) != entry.shape:
            raise InputError(f"{kind}: {entry.name}: is not held as a checkpoint holds it")
        unit = held.dtype.itemsize
        numbers = held.detach().reshape(-1)[start // unit : (start + size) // unit].cpu().contiguous()
        return numbers.view(torch.uint8).numpy().tobytes()

    return Checkpoint(Path(kind), config, (), entries, None, read_data=read)
