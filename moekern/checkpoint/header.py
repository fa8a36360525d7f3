"""The header of one safetensors file, checked once."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from moekern.checkpoint.pointers import check_no_pointer
from moekern.checkpoint.strict_json import HEADER_CAP, parse_json, read_start, regular_size, shown
from moekern.errors import InputError

DTYPE_BITS: dict[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
NAME_CAP = 1024  # characters of a tensor's name
SIZE_CAP, ARRAY_CAP = 1 << 62, 1 << 30  # bytes of a file; of a tensor that is read into memory


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor on disk. start and stop are byte offsets from the beginning of the shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One safetensors file. size and data_start are in bytes; tensors are in offset order and,
    as read, fill the data part. mtime_ns is None where the header alone is there."""

    name: str
    path: Path
    data_start: int
    size: int
    metadata: dict[str, str]
    tensors: tuple[TensorEntry, ...]
    mtime_ns: int | None = None

    def check_unchanged(self) -> None:
        """Raise InputError when the file is not what it was when its header was read."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror or error}") from error
        if self.mtime_ns is not None and (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise InputError(f"{self.path}: was changed or replaced after it was opened; run the same command again")


def read_shard(path: Path) -> Shard:
    """A file's header, read and checked. Raises InputError."""
    check_no_pointer(path)
    size, mtime_ns = regular_size(path), path.stat().st_mtime_ns
    length = header_length(read_start(path, min(8, size))[0], path, size)
    return replace(parse_header(read_start(path, 8, length)[1], path, size), mtime_ns=mtime_ns)


def header_length(data: bytes, path: Path, size: int) -> int:
    """The length that the first 8 bytes of a file of `size` bytes give its header; no more than the file holds."""
    if size < 8:
        raise InputError(f"{path}: truncated: {size} bytes, a header needs at least 8")
    length = int.from_bytes(data[:8], "little")
    if length > HEADER_CAP:
        raise InputError(f"{path}: header of {length} bytes, more than the limit of {HEADER_CAP}")
    if 8 + length > size:
        raise InputError(f"{path}: truncated: {size} bytes, the header alone takes {8 + length}")
    return length


def parse_header(data: bytes, path: Path, size: int) -> Shard:
    """What the JSON of a header says about a file of `size` bytes; nothing is read.

    Checked: JSON, names, dtypes, shapes, and offsets that fill the file from the header's end without gap or overlap.
    Stricter than the format: a name is printable and at most NAME_CAP characters, an entry has the three fields of
    the format and no other, which a copy would lose. Raises InputError.
    """
    if not data.startswith(b"{"):
        raise InputError(f"{path}: header: not valid JSON: begins with {data[:4]!r}, expected '{{'")
    header = parse_json(data, f"{path}: header", strict=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ is not a map of strings")
    data_start = 8 + len(data)
    tensors = [read_entry(path, name, info, data_start) for name, info in header.items()]
    tensors.sort(key=lambda entry: (entry.start, entry.stop))
    check_offsets(path, tensors, data_start, size)
    return Shard(path.name, path, data_start, size, metadata, tuple(tensors))


def read_entry(path: Path, name: str, info: Any, data_start: int) -> TensorEntry:
    def refuse(what: str) -> InputError:
        return InputError(f"{path}: tensor {shown(name)}: {what}")

    if not name.isprintable() or len(name) > NAME_CAP:
        raise refuse(f"its name is not a printable one of at most {NAME_CAP} characters")
    if not isinstance(info, dict):
        raise refuse("its header entry is not an object")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or not set(map(type, shape)) <= {int} or min(shape, default=0) < 0:
        raise refuse(f"bad shape {shown(shape)}")
    if not isinstance(offsets, list) or list(map(type, offsets)) != [int, int]:
        raise refuse(f"bad data_offsets {shown(offsets)}")
    start, stop = offsets
    if not 0 <= start <= stop < SIZE_CAP:
        raise refuse(f"bad data_offsets {shown(offsets)}")
    if len(info) > 3:
        raise refuse(f"fields that the format does not know: {shown(list(info))}")
    bits = DTYPE_BITS[dtype]
    for n in shape:
        bits *= n
        if bits >= SIZE_CAP or n >= SIZE_CAP:
            raise refuse(f"shape {shown(shape)} overflows")
    if bits != 8 * (stop - start):
        raise refuse(f"{dtype} {shown(shape)} takes {bits / 8:g} bytes, data_offsets give {stop - start}")
    return TensorEntry(
        name, sys.intern(dtype), held_once(tuple(shape)), path.name, data_start + start, data_start + stop
    )


@lru_cache(maxsize=1024)
def held_once(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The first of equal shapes: a large model has 100,000 tensors and a dozen shapes."""
    return shape


def check_offsets(path: Path, tensors: list[TensorEntry], data_start: int, size: int) -> None:
    """Tensors in offset order must follow one another from the end of the header to the end of the file."""
    end = data_start
    for entry in tensors:
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else f"leaves {entry.start - end} bytes unused"
            raise InputError(f"{path}: tensor {shown(entry.name)} {what} at byte {entry.start}")
        if entry.stop > size:
            raise InputError(f"{path}: truncated: {size} bytes, tensor {shown(entry.name)} ends at {entry.stop}")
        end = entry.stop
    if end != size:
        raise InputError(f"{path}: {size - end} bytes follow the last tensor")
