"""A folder of shards, opened by the safetensors library."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moekern.checkpoint.folder import INDEX, SINGLE, check_weight_map
from moekern.checkpoint.header import header_length
from moekern.checkpoint.strict_json import parse_json, read_json, read_start, regular_size

PACKED = ("F4", "F6_E2M3", "F6_E3M2")
CHUNK = 64 << 20  # bytes of one tensor compared at a time


class Folder:
    """Shards opened by the safetensors library. `shards` maps a tensor's name to its file.

    files: of a source, whose last file in name order has the say about a tensor; without, those that the index names,
    each with tensors of its own.
    """

    def __init__(self, folder: Path, stack: ExitStack, files: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.index = read_json(folder / INDEX) if os.path.lexists(folder / INDEX) else None
        listed = {SINGLE} if self.index is None else set(check_weight_map(folder, self.index).values())
        self.files = sorted(listed if files is None else files)
        self.opened: dict[str, Any] = {}
        self.header = cache(_header)  # of packed tensors' files
        self.shards: dict[str, str] = {}
        for name in self.files:
            regular_size(folder / name)
            try:
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{name}: {error}") from error
            self.opened[name] = file
            for key in file.keys():  # noqa: SIM118  safe_open is no mapping
                if key in self.shards and files is None:
                    raise ValueError(f"{key} is in {self.shards[key]} and in {name}")
                self.shards[key] = name
        self.data_bytes = sum((folder / name).stat().st_size - _data_start(folder / name) for name in self.files)

    def described(self, key: str) -> tuple[str, list[int]]:
        """dtype, as the file names it, and shape."""
        part = self.opened[self.shards[key]].get_slice(key)
        return part.get_dtype(), list(part.get_shape())

    def tensor(self, key: str) -> Tensor:
        return self.opened[self.shards[key]].get_tensor(key)

    def bytes(self, key: str, axis: int, start: int, stop: int, *, cut: bool) -> Tensor:
        """uint8 [..., bytes of an element]: start:stop of a tensor along `axis`. cut: of experts; else of `blocks`."""
        dtype, shape = self.described(key)
        if dtype in PACKED:
            return self._packed(key, shape[: axis + 1] if cut else [1]).narrow(axis, start, stop - start)
        if not shape:
            return self.tensor(key).unsqueeze(-1).view(torch.uint8)
        index = (*(slice(None) for _ in range(axis)), slice(start, stop))
        return self.opened[self.shards[key]].get_slice(key)[index].contiguous().unsqueeze(-1).view(torch.uint8)

    def all_bytes(self, key: str) -> Iterator[Tensor]:
        """The bytes of a tensor in blocks of at most 64 MiB, or a row."""
        dtype, shape = self.described(key)
        for _, start, _, count in blocks(dtype, shape) if 0 not in shape else ():
            yield self.bytes(key, 0, start, start + count, cut=False)

    def _packed(self, key: str, shape: list[int]) -> Tensor:
        """Elements of 4 or 6 bits, which the library does not cut: the bytes as stored, [*shape, -1]."""
        path = self.folder / self.shards[key]
        header, data_start = self.header(path)
        start, stop = header[key]["data_offsets"]
        with path.open("rb") as file:
            file.seek(data_start + start)
            data = bytearray(file.read(stop - start))
        return torch.frombuffer(data, dtype=torch.uint8).reshape(*shape, -1)


def blocks(dtype: str, shape: list[int]) -> Iterator[tuple[str, int, int, int]]:
    """(what, first row, first row, rows): a whole tensor in blocks of rows of at most 64 MiB, or a row; in one block
    where rows cannot be told apart."""
    if len(shape) < 2 or dtype in PACKED:
        yield "", 0, 0, shape[0] if shape and dtype not in PACKED else 1
        return
    step = max(1, CHUNK // (8 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield "", start, start, min(step, shape[0] - start)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON of a shard's header, and the byte at which its data start."""
    start = _data_start(path)
    return parse_json(read_start(path, 8, start - 8)[1], str(path)), start


def _data_start(path: Path) -> int:
    return 8 + header_length(read_start(path, 8)[0], path, regular_size(path))
