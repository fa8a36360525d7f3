"""Files of states: written when a layer is done, read where a stopped run goes on.

The tensors, one after another; an index of them, JSON: of each state its name, and of each of its tensors the place
among a layer's arguments, dtype, shape and first byte; and in 8 bytes the length of the index.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern import files
from moekern.kernels.checks import short
from moekern.model.states import State, States, bytes_of, read_tensor

LENGTH = 8  # bytes


def write_states(path: Path, states: States, names: Iterable[Hashable]) -> None:
    """Write what was put by these names (numbers, or tuples of words and numbers) to a new file, down to the disk.

    Raises OSError, and TypeError for places that JSON does not have.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb", buffering=files.CHUNK) as file:
        index, at = [], 0
        for name in names:
            state, places = states.look(name), list[Any]()
            for where, value in ((None, state.hidden), *state.beside.items()):
                value = value.contiguous()
                file.write(bytes_of(value))
                places.append([where, short(value.dtype), list(value.shape), at])
                at += value.nbytes
            index.append([name, places])
        text = json.dumps(index).encode()
        file.write(text + len(text).to_bytes(LENGTH, "little"))
        file.flush()
        os.fsync(file.fileno())


class StateFiles(Mapping[Hashable, State]):
    """The states of several files, which several processes may have written; each is read when it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises InputError for what is no file, and ValueError for an index that cannot be right."""
        self.handles: dict[Path, int] = {}
        self.places: dict[Hashable, tuple[Path, Any]] = {}
        try:
            for path in paths:
                self.handles[path] = files.open_plain(path, os.O_RDONLY)
                for name, places in _index(self.handles[path]):
                    self.places[name] = path, places
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: Hashable) -> State:
        path, places = self.places[name]
        (_, *hidden), *beside = places
        handle = self.handles[path]
        return State(_read(handle, *hidden), {tuple(where): _read(handle, *place) for where, *place in beside})

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def names(self, path: Path) -> set[Hashable]:
        """Those of one file."""
        return {name for name, (place, _) in self.places.items() if place == path}

    def close(self, paths: Iterable[Path] | None = None) -> None:
        """Let go of files (None: all), whose states are needed no more."""
        for path in list(self.handles) if paths is None else paths:
            if path in self.handles:
                os.close(self.handles.pop(path))


def _index(handle: int) -> list[tuple[Hashable, Any]]:
    """Name -> places, all of which lie within the file."""
    end = os.fstat(handle).st_size - LENGTH
    length = int.from_bytes(os.pread(handle, LENGTH, max(0, end)), "little")
    if not 0 < length <= end:
        raise ValueError("no index")
    found = []
    for name, places in json.loads(os.pread(handle, length, end - length)):
        for i, (where, dtype, shape, start) in enumerate(places):
            size = math.prod(shape) * getattr(torch, dtype).itemsize
            inside = all(type(n) is int and n >= 0 for n in (*shape, start)) and start + size <= end - length
            if not inside or (i == 0) != (where is None):
                raise ValueError("an index that leads out of the file")
        found.append((tuple(name) if isinstance(name, list) else name, places))
    return found


def _read(handle: int, dtype: str, shape: Sequence[int], start: int) -> Tensor:
    return read_tensor(handle, start, shape, getattr(torch, dtype), "a file of hidden states")
