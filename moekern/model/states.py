"""What tasks hand on between two layers: in memory as far as it may be, else in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path as Folder
from typing import Any

import torch
from torch import Tensor

from moekern.errors import InputError, memory_for
from moekern.model.memory import room_for
from moekern.model.pinned import ALIGNMENT, Blocks

Path = tuple[Any, ...]  # of a tensor in nested arguments
CPU = torch.device("cpu")
FILE = "the file of hidden states"
LARGE = 1 << 18  # bytes of a tensor that gets pages of its own; a process may have some 65,000 such areas


@dataclass(frozen=True)
class State:
    """What a decoder layer is given of the layers before it."""

    hidden: Tensor
    beside: Mapping[Path, Tensor]  # what else they have returned, by its place among the arguments

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + sum(value.nbytes for value in self.beside.values())

    def moved(self, device: torch.device, *, copy: bool = False) -> State:
        """On a device; a GPU's copies are under way then, in the order of its stream."""
        aside = device.type == "cuda"
        beside = {path: value.to(device, non_blocking=aside, copy=copy) for path, value in self.beside.items()}
        return State(self.hidden.to(device, non_blocking=aside, copy=copy), beside)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file."""

    start: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass
class _Slot:
    """Where a task's tensors lie in the file, hidden states first, and the room that they have there."""

    room: range
    places: list[tuple[Path | None, _Place]]


class States:
    """States by name (a task's number), on the CPU, in `blocks` of pinned memory where these are given. Beyond `memory`
    bytes (None: no limit) they go to a file that has no name, in `folder` (None: the system's folder for such), each to
    a place of its own."""

    def __init__(self, memory: int | None = None, folder: Folder | None = None, blocks: Blocks | None = None) -> None:
        self.memory, self.folder, self.blocks = memory, folder, blocks
        self.held: dict[Hashable, State] = {}
        self.slots: dict[Hashable, _Slot] = {}
        self.marks: dict[Hashable, Any] = {}  # of those in blocks: what is waited for before the host reads them
        self.loose = self.end = 0  # bytes in memory that are in no block, and in the file
        self.file: int | None = None
        self.there: dict[Hashable, bool] = {}  # what was put and not taken -> whether it never changes
        self.saved: Mapping[Hashable, State] = {}  # what a stopped run has left, read when it is taken

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return self.loose + (0 if self.blocks is None else self.blocks.nbytes)

    def take_over(
        self, saved: Mapping[Hashable, State], names: Iterable[Hashable], lasting: Collection[Hashable] = ()
    ) -> None:
        """As if what a stopped run has left by these names had been put; some of it is `lasting`."""
        self.saved = saved
        self.there |= {name: name in lasting for name in names}

    def put(self, name: Hashable, state: State, *, lasting: bool = False) -> None:
        """`lasting`: nothing else will be put by this name. Raises InputError where the file cannot take it."""
        self.there[name] = lasting
        self.marks.pop(name, None)
        if (held := self._in_block(state)) is not None:
            assert self.blocks is not None
            self.held[name], self.marks[name] = held, self.blocks.mark()
            return
        if self.memory is None or self.size + state.nbytes <= self.memory:
            with memory_for("hidden states", "give more (--memory), or less text (--tokens)"):
                self.held[name] = State(_own(state.hidden), {path: _own(value) for path, value in state.beside.items()})
            self.loose += state.nbytes
            return
        own = State(_here(state.hidden), {path: _here(value) for path, value in state.beside.items()})
        slot = self.slots.get(name)
        room = slot.room if slot is not None and len(slot.room) >= own.nbytes else self._more(own.nbytes)
        start, places = room.start, []
        for path, value in ((None, own.hidden), *own.beside.items()):
            places.append((path, _Place(start, value.shape, value.dtype)))
            self._write(start, value)
            start += value.nbytes
        self.slots[name] = _Slot(room, places)

    def take(self, name: Hashable) -> State:
        """What was put; in memory it is held here no longer."""
        state = self.look(name)
        del self.there[name]
        if self.held.pop(name, None) is not None and self.marks.pop(name, self) is self:
            self.loose -= state.nbytes
        return state

    def copy(self, name: Hashable, device: torch.device = CPU) -> State:
        """A copy of what was put, which stays, on a device."""
        return self.look(name).moved(device, copy=name in self.held)

    def look(self, name: Hashable) -> State:
        """What was put and stays: not to be changed. Copies from a device are waited for."""
        if (mark := self.marks.get(name)) is not None:
            mark.synchronize()
        if name in self.held:
            return self.held[name]
        return self._read(self.slots[name]) if name in self.slots else self.saved[name]

    def rows(self, name: Hashable, path: Path, own: slice) -> Tensor:
        """Of what was put and stays, the rows of its hidden states [T, H] that what lies beside them numbers there."""
        if name in self.held or name not in self.slots:
            state = self.look(name)
            return state.hidden[state.beside[path][own]]
        places = dict(self.slots[name].places)
        numbers, hidden = self._tensor(places[path])[own].tolist(), places[None]
        if len(numbers) >= hidden.shape[0]:
            return self._tensor(hidden)[numbers]
        found = torch.empty(len(numbers), *hidden.shape[1:], dtype=hidden.dtype)
        data, size = bytes_of(found), found[:1].nbytes
        assert self.file is not None
        for n, number in enumerate(numbers):
            _read_into(data[n * size : (n + 1) * size], self.file, hidden.start + number * size, FILE)
        return found

    def nbytes(self, name: Hashable) -> int:
        """About the bytes of what this process has put."""
        if name in self.held:
            return self.held[name].nbytes
        return len(self.slots[name].room) if name in self.slots else 0

    def __enter__(self) -> States:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.held.clear()
        self.slots.clear()
        self.there.clear()
        self.marks.clear()
        self.saved = {}
        self.loose = self.end = 0
        if self.blocks is not None:
            self.blocks.clear()
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def _in_block(self, state: State) -> State | None:
        """The same in a block, to which copies from a device are under way; None where there is none for it."""
        if self.blocks is None:
            return None
        parts = [(None, state.hidden), *state.beside.items()]
        starts = [0, *accumulate(-(-value.nbytes // ALIGNMENT) * ALIGNMENT for _, value in parts)]
        block = self.blocks.block(starts[-1], None if self.memory is None else self.memory - self.loose)
        if block is None:
            return None
        if state.hidden.device == CPU:
            self.blocks.wait()
        made = dict[Path | None, Tensor]()
        for start, (path, value) in zip(starts, parts, strict=False):
            place = block[start : start + value.nbytes].view(value.dtype).view(value.shape)
            made[path] = place.copy_(value.detach(), non_blocking=True)
        return State(made.pop(None), {path: value for path, value in made.items() if path is not None})

    def _more(self, nbytes: int) -> range:
        self.end += nbytes
        return range(self.end - nbytes, self.end)

    def _write(self, start: int, value: Tensor) -> None:
        try:
            if self.file is None:
                with tempfile.TemporaryFile(dir=self.folder) as file:
                    self.file = os.dup(file.fileno())
            write_tensor(self.file, start, value)
        except OSError as error:
            place = self.folder or tempfile.gettempdir()
            raise InputError(f"{place}: no room for hidden states beyond --memory: {error.strerror}") from error

    def _read(self, slot: _Slot) -> State:
        (_, hidden), *beside = slot.places
        return State(self._tensor(hidden), {path: self._tensor(place) for path, place in beside if path is not None})

    def _tensor(self, place: _Place) -> Tensor:
        assert self.file is not None
        return read_tensor(self.file, place.start, place.shape, place.dtype, FILE)


def _here(value: Tensor) -> Tensor:
    """The same numbers on the CPU, one after another."""
    return value.detach().to(CPU).contiguous()


def _own(value: Tensor) -> Tensor:
    """The same in memory of its own: a part of something larger must not keep it all, and what waits for long between
    what comes and goes would leave holes in the heap, of twice its size."""
    if value.nbytes < LARGE:
        own = _here(value)
        return own.clone() if own.untyped_storage().nbytes() > own.nbytes else own
    return room_for(value.shape, value.dtype, CPU, LARGE).copy_(value.detach())


def read_tensor(file: int, start: int, shape: Sequence[int], dtype: torch.dtype, what: str) -> Tensor:
    """The tensor that lies at byte `start` of an open file, which is `what` where it ends too early (InputError)."""
    out = torch.empty(tuple(shape), dtype=dtype)
    _read_into(bytes_of(out), file, start, what)
    return out


def write_tensor(file: int, start: int, value: Tensor) -> None:
    """Put a tensor on the CPU, whose numbers lie one after another, at byte `start` of an open file."""
    data = bytes_of(value)
    while data:
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written


def _read_into(data: memoryview, file: int, start: int, what: str) -> None:
    while data:
        got = os.preadv(file, [data], start)
        if not got:
            raise InputError(f"{what} ends early: something has cut it")
        data, start = data[got:], start + got


def bytes_of(value: Tensor) -> memoryview:
    """The memory of a tensor on the CPU whose numbers lie one after another."""
    return memoryview(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type,unused-ignore]
