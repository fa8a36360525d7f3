"""Rows of numbers in memory, and beyond a budget in a file that has no name."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moekern import files
from moekern.errors import InputError, memory_for
from moekern.files import sized

FEWER = "give less text (--tokens)"
BLOCK = 1 << 24  # bytes that are gone through at once


class RowStore:
    """A tensor [N, C] of zeros: in memory, or mapped to an unnamed file in `folder` (None: the system's).

    The file is gone when the store is closed and nobody holds its tensor any longer. All methods give the same bits in
    both places. Raises InputError where neither memory nor disk has room.
    """

    def __init__(
        self, rows: int, columns: int, dtype: torch.dtype, *, on_disk: bool = False, folder: Path | None = None
    ) -> None:
        nbytes = rows * columns * dtype.itemsize
        self._tensor: Tensor | None
        if on_disk and nbytes:
            self._tensor = _mapped(nbytes, folder).view(dtype).view(rows, columns)
        else:
            with memory_for(
                f"{sized(nbytes)} of rows", f"allow less (--memory), so that a file holds them, or {FEWER}"
            ):
                self._tensor = torch.zeros(rows, columns, dtype=dtype)

    @classmethod
    def of(cls, tensor: Tensor) -> RowStore:
        """A tensor [N, C] that is there already, on any device, as a store; it is not copied."""
        store = cls.__new__(cls)
        store._tensor = tensor
        return store

    @property
    def tensor(self) -> Tensor:
        """All rows [N, C]: what is written to it is in the store."""
        if self._tensor is None:
            raise RuntimeError("the store is closed")
        return self._tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def gather(self, rows: Tensor) -> Tensor:
        """A copy of these rows (int64 [n]), [n, C]."""
        return self.tensor.index_select(0, rows.to(self.tensor.device))

    def scatter(self, rows: Tensor, values: Tensor) -> None:
        """Write these rows (int64 [n], each once) with values [n, C]."""
        self.tensor.index_copy_(0, rows.to(self.tensor.device), values.to(self.tensor))

    def beside(self, other: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """These rows (int64 [n]) on the device of `other`: the whole and their numbers in it, or a copy of them alone
        and theirs in that."""
        if self.tensor.device == other.device:
            return self.tensor, rows.to(other.device)
        return self.gather(rows).to(other.device), torch.arange(len(rows), device=other.device)

    def __getitem__(self, rows: slice) -> Tensor:
        """A view of some rows that follow one another."""
        return self.tensor[rows]

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        self.tensor[rows] = values

    def copy_from(self, other: RowStore) -> None:
        """Take the numbers of a store of the same shape."""
        for rows in self.slices():
            self[rows] = other[rows]

    def slices(self) -> Iterator[slice]:
        """All rows in order, in pieces of about 16 MiB."""
        rows, columns = self.tensor.shape
        step = max(1, BLOCK // max(1, columns * self.tensor.dtype.itemsize))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def close(self) -> None:
        self._tensor = None

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_rows(residual: RowStore, held: Tensor, hidden: int) -> None:
    """Raise ValueError unless `residual` is float32 [N, hidden] and `held` bool [N] on the CPU."""
    found = residual.tensor
    if found.dtype != torch.float32 or found.ndim != 2 or found.shape[1] != hidden:
        raise ValueError(f"[refit] residual: expected float32 [N, {hidden}], got {found.dtype} {list(found.shape)}")
    if held.dtype != torch.bool or held.shape != found.shape[:1] or held.device.type != "cpu":
        place = f"{held.dtype} {list(held.shape)} on {held.device}"
        raise ValueError(f"[refit] held: expected bool [{len(found)}] on the CPU, got {place}")


@dataclass
class Room:
    """Bytes of memory that may still be taken (None: no limit), and the folder for what goes beyond."""

    left: int | None = None
    folder: Path | None = None

    def take(self, nbytes: int) -> bool:
        """Take so many bytes if they are there."""
        if self.left is None:
            return True
        if nbytes > self.left:
            return False
        self.left -= nbytes
        return True

    @contextmanager
    def store(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Iterator[RowStore]:
        """A store of zeros, in memory where that has room. Raises InputError where the disk has none either."""
        nbytes = rows * columns * dtype.itemsize
        here = self.take(nbytes)
        try:
            with RowStore(rows, columns, dtype, on_disk=not here, folder=self.folder) as store:
                yield store
        finally:
            if here and self.left is not None:
                self.left += nbytes

    @contextmanager
    def copy(self, other: RowStore) -> Iterator[RowStore]:
        """A store with the same numbers: on the CPU as `store`, on a device beside it."""
        if other.tensor.device.type != "cpu":
            yield RowStore.of(other.tensor.clone())
            return
        with self.store(len(other), other.tensor.shape[1], other.tensor.dtype) as copy:
            copy.copy_from(other)
            yield copy


def _mapped(nbytes: int, folder: Path | None) -> Tensor:
    """Bytes of a new file, uint8 [nbytes]. Its blocks are taken at once: a full disk would end the process later."""
    place = folder or Path(tempfile.gettempdir())
    ways = "give more memory (--memory), another folder (--spill) or less text (--tokens)"
    try:
        if nbytes > (free := shutil.disk_usage(place).free):
            raise InputError(f"{place}: has {sized(free)} free, and {sized(nbytes)} of rows go there; {ways}", "memory")
        with tempfile.TemporaryFile(dir=place) as file:
            files.reserve(file.fileno(), nbytes)
            return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
    except OSError as error:
        raise InputError(f"{place}: no room for {sized(nbytes)} of rows: {files.reason(error)}; {ways}") from error
