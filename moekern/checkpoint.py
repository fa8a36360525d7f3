"""A safetensors checkpoint folder: every header is checked once at the door, and everything after trusts it."""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moekern.errors import InputError

HEADER_CAP = 100_000_000
DTYPE_BITS: dict[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz")
SIDE_FOLDERS = ("additional_chat_templates",)
JSON_CAP = 1 << 30  # an index names each tensor in about 100 bytes
SIZE_CAP = 1 << 62
NUMPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
# exponent bits, mantissa bits and exponent bias
SMALL_FLOATS = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15), "F8_E4M3FNUZ": (4, 3, 8), "F8_E5M2FNUZ": (5, 2, 16)}


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
    """One safetensors file. size and data_start are in bytes; tensors are in offset order and fill the data part."""

    name: str
    path: Path
    data_start: int
    size: int
    metadata: dict[str, str]
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and one or more shards, in name order. index is None for a single file."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorEntry]
    index: dict[str, Any] | None

    @cached_property
    def side_files(self) -> tuple[str, ...]:
        """Names, relative to the folder, of the files that belong to the model but hold neither weights nor config."""
        skipped = (*WEIGHTS, *(f"{suffix}.index.json" for suffix in WEIGHTS))
        found = [path for path in self.folder.iterdir() if path.is_file()]
        for folder in SIDE_FOLDERS:
            found += [path for path in self.folder.glob(f"{folder}/**/*") if path.is_file()]
        names = (path.relative_to(self.folder).as_posix() for path in found if not path.name.endswith(skipped))
        return tuple(sorted(name for name in names if name != CONFIG))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all names, dtypes and shapes and of 4 KiB from the middle of 64 tensors.

        A re-sharded copy has the same fingerprint, a fine-tune another; config.json has no part in it.
        """
        names = sorted(self.tensors)
        rows = [[name, self.tensors[name].dtype, self.tensors[name].shape] for name in names]
        digest = hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode())
        for i in sorted({i * len(names) // 64 for i in range(64)}):
            entry = self.tensors[names[i]]
            middle = entry.start + max(0, entry.nbytes - 4096) // 2
            digest.update(self._pread(entry, middle, min(4096, entry.nbytes)))
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.size - shard.data_start for shard in self.shards)

    def read(self, name: str) -> bytes:
        """The bytes of one tensor, read with pread. Raises InputError if the shard has shrunk meanwhile."""
        entry = self.tensors[name]
        return self._pread(entry, entry.start, entry.nbytes)

    def array(self, name: str) -> np.ndarray:
        """One small tensor in its shape; BF16 and 8-bit floats are widened to float32, other dtypes stay.

        Raises InputError for the packed 4- and 6-bit dtypes.
        """
        entry = self.tensors[name]
        if DTYPE_BITS[entry.dtype] < 8:
            raise InputError(f"{self.folder / entry.shard}: {name}: packed dtype {entry.dtype} has no numpy form")
        return decode(self.read(name), entry.dtype).reshape(entry.shape)

    def _pread(self, entry: TensorEntry, start: int, size: int) -> bytes:
        path = self.folder / entry.shard
        parts: list[bytes] = []
        with _naming(path), path.open("rb", buffering=0) as file:
            while size > 0:
                part = os.pread(file.fileno(), min(size, 1 << 30), start)
                if not part:
                    raise InputError(f"{path}: {entry.name}: the file has shrunk to {start} bytes")
                parts.append(part)
                start += len(part)
                size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def decode(data: bytes, dtype: str) -> np.ndarray:
    """A flat array of the safetensors dtype; BF16 and 8-bit floats become float32 without rounding."""
    if dtype in NUMPY_DTYPES:
        return np.frombuffer(data, NUMPY_DTYPES[dtype])
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    codes = np.arange(256)
    if dtype == "F8_E8M0":
        table = np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127))
    else:
        table = small_float_table(dtype)
    return table.astype(np.float32)[np.frombuffer(data, np.uint8)]


def small_float_table(dtype: str) -> np.ndarray:
    """The 256 values of an 8-bit float, float64."""
    exponent_bits, mantissa_bits, bias = SMALL_FLOATS[dtype]
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    values = np.ldexp(np.where(exponent == 0, mantissa, 1 + mantissa), np.maximum(exponent, 1) - bias)
    values = np.where(codes >= 128, -values, values)
    if dtype.endswith("FNUZ"):
        values[128] = np.nan
    elif dtype == "F8_E4M3":
        values[[0x7F, 0xFF]] = np.nan
    else:
        values[[0x7C, 0xFC]] = np.inf, -np.inf
        values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return values


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read config, index and all headers of a checkpoint folder; no tensor is read.

    Raises InputError, naming the file and the tensor, for anything missing, truncated, contradictory or malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    config = read_json(folder / CONFIG)
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else None
    weight_map = check_weight_map(folder, index) if index is not None else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [find_single(folder)]
    missing = [name for name in names if not os.path.exists(folder / name)]
    if missing:
        raise InputError(f"{folder}: missing shard {missing[0]} ({len(missing)} of {len(names)} are missing)")

    shards = tuple(read_shard(folder / name) for name in names)
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for entry in shard.tensors:
            other = tensors.setdefault(entry.name, entry)
            if other is not entry:
                raise InputError(f"{shard.path}: tensor {entry.name!r} is also in {other.shard}")
    if weight_map is not None:
        compare_with_index(folder / INDEX, weight_map, tensors)
    return Checkpoint(folder, config, shards, tensors, index)


def find_single(folder: Path) -> str:
    """The only shard's name in a folder that has no index."""
    if (folder / SINGLE).exists():
        return SINGLE
    names = sorted(path.name for path in folder.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(PICKLES)]
    if shards:
        raise InputError(f"{folder}: {shards[0]} is there, but neither {SINGLE} nor {INDEX}")
    if pickles:
        raise InputError(f"{folder}: {pickles[0]} is a pickle, which is never read; convert it to safetensors first")
    raise InputError(f"{folder}: no safetensors file")


def check_weight_map(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    path, weight_map = folder / INDEX, index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map is missing or empty")
    examples = {str(name): (key, name) for key, name in weight_map.items()}
    for key, name in examples.values():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise InputError(f"{path}: {key!r} is in {name!r:.80}, which is not a safetensors file")
        if os.path.basename(name) != name or "\\" in name or not name.isprintable():
            raise InputError(f"{path}: {key!r} is in {name!r:.80}, which is not a file of this folder")
    if (folder / SINGLE).exists() and SINGLE not in weight_map.values():
        raise InputError(f"{folder}: has both {SINGLE} and {INDEX}, which does not name it; remove one")
    return weight_map


def compare_with_index(path: Path, weight_map: dict[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for key, name in weight_map.items():
        if key not in tensors:
            raise InputError(f"{path}: {key!r} should be in {name}, which does not hold it")
        if tensors[key].shard != name:
            raise InputError(f"{path}: {key!r} should be in {name}, but is in {tensors[key].shard}")
    for key, entry in tensors.items():
        if key not in weight_map:
            raise InputError(f"{path}: {key!r} of {entry.shard} is not listed")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; duplicate keys are refused."""
    if regular_size(path) > JSON_CAP:
        raise InputError(f"{path}: larger than {JSON_CAP} bytes")
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            count = Counter(key for key, _ in pairs)
            raise ValueError(f"duplicate key {next(key for key in count if count[key] > 1)!r}")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def regular_size(path: Path) -> int:
    """Size in bytes of a regular file, or of the one a symbolic link leads to; devices and pipes are refused."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: not readable by this user")
    return status.st_size


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error while a file is read names the file; that of a read alone does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_shard(path: Path) -> Shard:
    """A file's header, checked: length, JSON, dtypes, shapes, and offsets that fill the file without gap or overlap."""
    size = regular_size(path)
    if size < 8:
        raise InputError(f"{path}: truncated: {size} bytes, a header needs at least 8")
    with _naming(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_CAP:
            raise InputError(f"{path}: header of {length} bytes, more than the limit of {HEADER_CAP}")
        if 8 + length > size:
            raise InputError(f"{path}: truncated: {size} bytes, the header alone takes {8 + length}")
        header = parse_json(file.read(length), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ is not a map of strings")
    check_encodable(path, [*header, *metadata, *metadata.values()])
    tensors = [read_entry(path, name, info, 8 + length) for name, info in header.items()]
    tensors.sort(key=lambda entry: (entry.start, entry.stop))
    check_offsets(path, tensors, 8 + length, size)
    return Shard(path.name, path, 8 + length, size, metadata, tuple(tensors))


def check_encodable(path: Path, strings: list[str]) -> None:
    try:
        "".join(strings).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: header holds a string that is not valid Unicode: {error}") from None


def read_entry(path: Path, name: str, info: Any, data_start: int) -> TensorEntry:
    def refuse(what: str) -> InputError:
        return InputError(f"{path}: tensor {name!r}: {what}")

    if not isinstance(info, dict):
        raise refuse("its header entry is not an object")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"unknown dtype {dtype!r:.80}")
    if not isinstance(shape, list) or not set(map(type, shape)) <= {int} or min(shape, default=0) < 0:
        raise refuse(f"bad shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise refuse(f"bad data_offsets {offsets!r:.80}")
    start, stop = offsets
    if not 0 <= start <= stop < SIZE_CAP:
        raise refuse(f"bad data_offsets {offsets!r:.80}")
    bits = DTYPE_BITS[dtype]
    for n in shape:
        bits *= n
        if bits >= SIZE_CAP:
            raise refuse(f"shape {shape!r:.80} overflows")
    if bits != 8 * (stop - start):
        raise refuse(f"{dtype} {shape!r:.80} takes {bits / 8:g} bytes, data_offsets give {stop - start}")
    return TensorEntry(name, dtype, tuple(shape), path.name, data_start + start, data_start + stop)


def check_offsets(path: Path, tensors: list[TensorEntry], data_start: int, size: int) -> None:
    """Tensors in offset order must follow one another from the end of the header to the end of the file."""
    end = data_start
    for entry in tensors:
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else f"leaves {entry.start - end} bytes unused"
            raise InputError(f"{path}: tensor {entry.name!r} {what} at byte {entry.start}")
        if entry.stop > size:
            raise InputError(f"{path}: truncated: {size} bytes, tensor {entry.name!r} ends at {entry.stop}")
        end = entry.stop
    if end != size:
        raise InputError(f"{path}: {size - end} bytes follow the last tensor")
