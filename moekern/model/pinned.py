"""Memory of the host that a GPU copies from and to by itself, while the host goes on."""

from __future__ import annotations

import ctypes
import warnings
import weakref
from bisect import insort
from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moekern.errors import first_line
from moekern.model.memory import pages

PORTABLE = 1  # pinned for every CUDA context
SLAB = 1 << 26  # bytes that are pinned at once, and about so many at most that are left over
ALIGNMENT = 64  # bytes, of every block


def pin(memory: Tensor) -> None:
    """Pin the pages that a uint8 tensor lies in. Raises torch's RuntimeError where the system refuses."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE))


def unpin(address: int, device: torch.device) -> None:
    """Give up what is pinned at this address, when all that is under way on the device is done."""
    torch.cuda.synchronize(device)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


@dataclass(eq=False)
class _Slab:
    memory: Tensor  # [nbytes] uint8
    free: list[tuple[int, int]]  # first byte and the one behind the last, rising, never next to each other

    def taken(self, nbytes: int) -> int | None:
        """The place of the first free bytes, so many, which are taken then; None where there are none."""
        for n, (start, stop) in enumerate(self.free):
            if stop - start >= nbytes:
                self.free[n : n + 1] = [(start + nbytes, stop)] if stop - start > nbytes else []
                return start
        return None

    def give_back(self, start: int, stop: int) -> None:
        insort(self.free, (start, stop))
        n = self.free.index((start, stop))
        if n + 1 < len(self.free) and self.free[n + 1][0] == stop:
            self.free[n : n + 2] = [(start, self.free[n + 1][1])]
        if n and self.free[n - 1][1] == start:
            self.free[n - 1 : n + 1] = [(self.free[n - 1][0], self.free[n][1])]

    @property
    def unused(self) -> bool:
        return self.free == [(0, self.memory.nbytes)]


class Blocks:
    """Blocks of pinned memory for a CUDA device (for another one they are not pinned). A block is free again when the
    last tensor that lies in it is gone. torch's own pinned allocator would round each up to a power of two."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.slabs: list[_Slab] = []
        self.refused = False  # the system pins no more
        self._back: deque[tuple[_Slab, int, int]] = deque()  # by whichever thread let go of the last tensor

    @property
    def nbytes(self) -> int:
        """Of all slabs, blocks or not."""
        return sum(slab.memory.nbytes for slab in self.slabs)

    def block(self, nbytes: int, most: int | None) -> Tensor | None:
        """[nbytes] uint8; None where all would be more than `most` bytes, or the system refuses, which is told."""
        nbytes = max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)
        while self._back:
            slab, start, stop = self._back.popleft()
            slab.give_back(start, stop)
        for slab in self.slabs:
            if (place := slab.taken(nbytes)) is not None:
                return self._lent(slab, place, nbytes)
        if most is not None and self.nbytes + nbytes > most:
            self.slabs = [slab for slab in self.slabs if not slab.unused]  # whose blocks were of other sizes
        room = max(1, SLAB // nbytes) if most is None else min(max(1, SLAB // nbytes), (most - self.nbytes) // nbytes)
        if room < 1 or self.refused or not self._grow(room * nbytes):
            return None
        place = self.slabs[-1].taken(nbytes)
        assert place is not None
        return self._lent(self.slabs[-1], place, nbytes)

    def _grow(self, nbytes: int) -> bool:
        memory = pages(nbytes, lasting=True)
        slab = _Slab(memory, [(0, nbytes)])
        if self.device.type == "cuda":
            try:
                pin(memory)
            except RuntimeError as error:
                self.refused = True
                warnings.warn(f"hidden states are not pinned: {first_line(error)}; copies take longer", stacklevel=4)
                return False
            weakref.finalize(slab, unpin, memory.data_ptr(), self.device).atexit = False
        self.slabs.append(slab)
        return True

    def _lent(self, slab: _Slab, place: int, nbytes: int) -> Tensor:
        bytes_there = (ctypes.c_char * nbytes).from_address(slab.memory.data_ptr() + place)
        back = partial(self._back.append, (slab, place, place + nbytes))
        weakref.finalize(bytes_there, back).atexit = False  # which keeps the slab as long as that
        return torch.frombuffer(bytes_there, dtype=torch.uint8)

    def wait(self) -> None:
        """Until the host may write to a block: what it held before may be on its way to the device."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def mark(self) -> torch.cuda.Event | None:
        """What the host is to wait for before it reads a block that was written to; None: nothing."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def clear(self) -> None:
        """Slabs go when no tensor lies in them any longer."""
        self.slabs.clear()
        self._back.clear()


def blocks_for(device: torch.device) -> Blocks | None:
    """Blocks where a GPU computes."""
    return Blocks(device) if device.type == "cuda" else None
