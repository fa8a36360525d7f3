"""Tensors of a checkpoint as torch tensors: whole layers into one buffer that is used again, or into their own memory.

Files are never mapped, and what is read is not left in the page cache.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor, nn

import moekern._C as _C
from moekern.architectures import ExpertTensor, MoeLayer
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import TensorEntry
from moekern.errors import InputError
from moekern.model.memory import pages, room_for
from moekern.model.pinned import pin, unpin
from moekern.team import ALONE, Team

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
# bench/reading.py on a virtual disk found no clear difference from 1 to 8; a faster disk's queue takes more
THREADS = 4
PAGE = 4096  # bytes read past the page cache lie at equal places in the pages of memory and file
DIRECT = 64 << 10  # runs of fewer bytes go through the page cache anyway
ALIGNMENT = 64  # bytes, of every other piece of memory; torch's own

Range = tuple[str, int, int, int]  # path, offset, length, address
Placed = list[tuple[TensorEntry, int]]  # entries and their places in a buffer


def read_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    """Read whole tensors, each into its own memory. Raises InputError for a dtype torch lacks, a failed read, and a
    file that was changed since its header was read."""
    paths = _paths(checkpoint)
    out = {name: _empty(checkpoint.tensors[name]) for name in names}
    _read(checkpoint, [_whole(paths, checkpoint.tensors[name], tensor.data_ptr()) for name, tensor in out.items()])
    return out


def read_experts(checkpoint: Checkpoint, layer: MoeLayer, experts: Sequence[int]) -> dict[str, Tensor]:
    """Read some experts of a layer, with their scales and other companions; what other experts hold is not read.

    Tensors of one expert are whole, under their own names. Of a stacked tensor come the experts' rows, in the order of
    `experts`: `len(experts) * rows` on the expert axis, no trailing rows. Routers and their biases are not among them.
    Raises ValueError for experts that the layer lacks or that are named twice, InputError as `read_tensors`.
    """
    if len(set(experts)) < len(experts) or not set(experts) <= set(range(layer.num_experts)):
        expected = f"expected different numbers below {layer.num_experts}"
        raise ValueError(f"[read_experts] experts: {expected}, got {list(experts)}")
    paths, ranges, out = _paths(checkpoint), list[Range](), dict[str, Tensor]()
    for tensor in layer.of_role("expert"):
        entry = checkpoint.tensors[tensor.name]
        if tensor.action == "slice":
            shape = list(entry.shape)
            shape[tensor.axis] = len(experts) * tensor.rows
            out[entry.name] = _empty(entry, shape)
            ranges += _row_ranges(paths, entry, tensor, experts, out[entry.name].data_ptr())
        elif tensor.expert in experts:
            out[entry.name] = _empty(entry)
            ranges.append(_whole(paths, entry, out[entry.name].data_ptr()))
    _read(checkpoint, ranges)
    return out


class LayerReader:
    """Reads groups of tensors (a decoder layer's) one after the other, each in the background, into one buffer.

    `start(i)` begins to read group i, `take()` waits and gives its tensors, `release(model)` ends their use: then the
    next may start. A group names tensors, or entries that are parts of tensors. Memory: the bytes of the largest group,
    and less than two pages for every run of neighbours in a file; allocated at the first start, freed on exit, pinned
    if `device` is a CUDA device. The tensors lie in memory as they do in the file, so they are to be copied from, not
    to compute with.

    Ranks of `team` on one node share the buffer, and the first of them reads; all must call the same methods in the
    same order.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        groups: Sequence[Iterable[str | TensorEntry]],
        device: torch.device,
        threads: int = THREADS,
        team: Team = ALONE,
    ) -> None:
        self.checkpoint, self.device, self.threads, self.paths = checkpoint, device, threads, _paths(checkpoint)
        self.team, self.reads = team, True
        self.groups = [_place([_entry(checkpoint, each) for each in names]) for names in groups]
        self.nbytes = max((place + entry.nbytes for group in self.groups for entry, place in group), default=0)
        self.buffer: Tensor | None = None  # [nbytes] uint8
        self._reading: tuple[int, Future[None]] | None = None
        self._cancelled = False
        self._pool = ThreadPoolExecutor(1, "moekern-read")

    def __enter__(self) -> LayerReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
        self._pool.shutdown()
        if self.buffer is not None and self.device.type == "cuda":
            unpin(self.buffer.data_ptr(), self.device)
        self.buffer = None

    def start(self, i: int) -> None:
        """Begin to read group i. The group taken before must have been released."""
        assert self._reading is None
        if self.buffer is None:
            self.buffer, self.reads = _shared(self.nbytes, self.device, self.team)
        self.team.meet_on_node()  # nobody looks at the group before any longer
        base = self.buffer.data_ptr()
        group = self.groups[i] if self.reads else []
        ranges = [_whole(self.paths, entry, base + place) for entry, place in group]
        self._cancelled = False
        self._reading = i, self._pool.submit(_read, self.checkpoint, ranges, self.threads, self._check)

    def begin(self, i: int) -> None:
        """As `start`, where group i is not the one that is being read; what else is being read is forgotten."""
        if self._reading is None or self._reading[0] != i:
            self.cancel()
            self.start(i)

    def take(self) -> dict[str, Tensor]:
        """The tensors of the group whose reading was started, valid until the next start. Errors as `read_tensors`."""
        assert self._reading is not None
        assert self.buffer is not None
        i, reading = self._reading
        reading.result()
        self.team.meet_on_node()
        self._reading = None
        return {entry.name: _view(self.buffer, entry, place) for entry, place in self.groups[i]}

    def release(self, model: nn.Module) -> None:
        """Give the buffer back: copies to the device on the current stream are waited for, and what in `model` still
        lies in it moves out."""
        assert self.buffer is not None
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        own = self.buffer.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta and tensor.untyped_storage().data_ptr() == own:
                tensor.data = room_for(tensor.shape, tensor.dtype, tensor.device).copy_(tensor.data)

    def give_up(self) -> None:
        """What is being read is not wanted: its reading ends soon, and `take` raises."""
        self._cancelled = True

    def cancel(self) -> None:
        """Stop reading, if anything is being read, and forget it."""
        if self._reading is not None:
            self.give_up()
            self._reading[1].exception()
            self._reading = None

    def _check(self, nbytes: int) -> None:
        if self._cancelled:
            raise RuntimeError("reading was cancelled")


def _entry(checkpoint: Checkpoint, each: str | TensorEntry) -> TensorEntry:
    return checkpoint.tensors[each] if isinstance(each, str) else each


def _shared(nbytes: int, device: torch.device, team: Team) -> tuple[Tensor, bool]:
    """A buffer that the ranks of a node share, and whether this rank is the one that reads into it. Where they cannot
    share one, each has its own and reads, and that is told."""
    if team.local_size == 1:
        return _pinned(nbytes, device), True
    handle, place, problem = -1, "", ""
    try:
        if team.local_rank == 0:
            handle, place = _memory_file(nbytes)
    except OSError as error:
        problem = f"{error.strerror}"
    place = team.every_on_node(place)[0]
    try:
        if team.local_rank > 0 and place:
            handle = os.open(place, os.O_RDWR)
    except OSError as error:
        problem = f"{error.strerror}"
    problems = [each for each in team.every_on_node(problem) if each]
    try:
        if not problems:
            return _pinned(nbytes, device, handle), team.local_rank == 0
    finally:
        if handle >= 0:
            os.close(handle)
    warnings.warn(
        f"the {team.local_size} processes of a node cannot share memory ({problems[0]}): each reads all weights",
        stacklevel=2,
    )
    return _pinned(nbytes, device), True


def _memory_file(nbytes: int) -> tuple[int, str]:
    """A file in memory with room for so many bytes, and where other processes of this user can open it."""
    handle = os.memfd_create("moekern-layer")
    try:
        os.posix_fallocate(handle, 0, max(nbytes, 1))
    except OSError:
        os.close(handle)
        raise
    return handle, f"/proc/{os.getpid()}/fd/{handle}"


def _pinned(nbytes: int, device: torch.device, handle: int = -1) -> Tensor:
    """[nbytes] uint8, see `pages`. Not torch's pinned memory: its allocator rounds sizes up to powers of two and keeps
    them."""
    buffer = pages(nbytes, handle, lasting=True)
    if device.type == "cuda":
        pin(buffer)
    return buffer


def _place(entries: Iterable[TensorEntry]) -> Placed:
    """Neighbours in a file stay neighbours; a long run of them keeps its place in the page, to be read directly."""
    runs: list[list[TensorEntry]] = []
    for entry in sorted(entries, key=lambda e: (e.shard, e.start, e.stop)):
        _dtype(entry)
        if runs and (runs[-1][-1].shard, runs[-1][-1].stop) == (entry.shard, entry.start):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    placed, end = Placed(), 0
    for run in runs:
        start = run[0].start
        direct = run[-1].stop - start >= DIRECT
        end = -(-end // PAGE) * PAGE + start % PAGE if direct else -(-end // ALIGNMENT) * ALIGNMENT
        placed += ((entry, end + entry.start - start) for entry in run)
        end += run[-1].stop - start
    return placed


def _view(buffer: Tensor, entry: TensorEntry, place: int) -> Tensor:
    raw, dtype = buffer[place : place + entry.nbytes], _dtype(entry)
    if place % dtype.itemsize:  # the file has it at an odd place, where torch cannot view it
        raw = raw.clone()
    return raw.view(dtype).reshape(entry.shape)


def _row_ranges(
    paths: dict[str, str], entry: TensorEntry, tensor: ExpertTensor, experts: Sequence[int], address: int
) -> Iterable[Range]:
    """The experts' rows of a stacked tensor, for every index before its expert axis."""
    row = math.prod(entry.shape[tensor.axis + 1 :]) * _dtype(entry).itemsize
    size, stride = tensor.rows * row, entry.shape[tensor.axis] * row
    for outer in range(math.prod(entry.shape[: tensor.axis])):
        for expert in experts:
            yield paths[entry.shard], entry.start + outer * stride + expert * size, size, address
            address += size


def _read(
    checkpoint: Checkpoint, ranges: list[Range], threads: int = THREADS, check: Callable[[int], None] | None = None
) -> None:
    """Raises InputError too for a file that was changed since its header was read: before, so that no pipe is waited
    for, and afterwards."""
    paths = {path for path, *_ in ranges}
    shards = [shard for shard in checkpoint.shards if os.fspath(shard.path) in paths]
    try:
        for shard in shards:
            shard.check_unchanged()
        _C.read_ranges(ranges, threads, progress=check)
        for shard in shards:
            shard.check_unchanged()
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror or error}") from error


def _paths(checkpoint: Checkpoint) -> dict[str, str]:
    return {shard.name: os.fspath(shard.path) for shard in checkpoint.shards}


def _whole(paths: dict[str, str], entry: TensorEntry, address: int) -> Range:
    return paths[entry.shard], entry.start, entry.nbytes, address


def _empty(entry: TensorEntry, shape: Sequence[int] | None = None) -> Tensor:
    return torch.empty(entry.shape if shape is None else shape, dtype=_dtype(entry))


def _dtype(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise InputError(f"{entry.shard}: {entry.name} has dtype {entry.dtype}, which torch cannot hold")
    return DTYPES[entry.dtype]
