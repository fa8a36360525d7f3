"""Tensors of a checkpoint as torch tensors, read by pread into their own memory, never mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from moekern.checkpoint import Checkpoint, TensorEntry
from moekern.errors import InputError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def read_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    """Read whole tensors, in file order. Raises InputError for a dtype torch lacks or a file that ends too early."""
    entries = sorted((checkpoint.tensors[name] for name in names), key=lambda e: (e.shard, e.start))
    paths = {shard.name: shard.path for shard in checkpoint.shards}
    out: dict[str, Tensor] = {}
    opened: tuple[str, int] | None = None
    try:
        for entry in entries:
            if opened is None or opened[0] != entry.shard:
                if opened is not None:
                    os.close(opened[1])
                opened = (entry.shard, os.open(paths[entry.shard], os.O_RDONLY))
            out[entry.name] = _read(opened[1], entry)
    finally:
        if opened is not None:
            os.close(opened[1])
    return out


def _read(file: int, entry: TensorEntry) -> Tensor:
    if entry.dtype not in DTYPES:
        raise InputError(f"{entry.shard}: {entry.name} has dtype {entry.dtype}, which torch cannot hold")
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    view, offset = memoryview(raw.numpy().data), entry.start
    while view:
        got = os.preadv(file, [view], offset)
        if got == 0:
            raise InputError(f"{entry.shard}: ends inside {entry.name}, at byte {offset} of {entry.stop}")
        view, offset = view[got:], offset + got
    return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)
