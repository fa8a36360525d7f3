"""A safetensors checkpoint folder: every header is checked once at the door, and everything after trusts it."""

import hashlib
import json
import os
import re
import reprlib
import stat
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moekern.dtypes import decode
from moekern.errors import InputError

HEADER_CAP = 100_000_000  # bytes of JSON: a million tensors in a header or an index
DEPTH_CAP, NAME_CAP = 64, 1024  # levels of a config, where real ones have six; characters of a tensor's name
DTYPE_BITS: dict[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PLAN_FILE = "moekern_plan.json"  # in a pruned folder: the plan it was made by
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz")
SIDE_FOLDERS = ("additional_chat_templates",)
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
        digest = hashlib.sha256(b"[")
        encode = json.JSONEncoder(separators=(",", ":")).encode
        for start in range(0, len(names), 4096):  # one JSON list of [name, dtype, shape], never held whole
            entries = [self.tensors[name] for name in names[start : start + 4096]]
            text = encode([(entry.name, entry.dtype, entry.shape) for entry in entries])
            digest.update(f"{',' if start else ''}{text[1:-1]}".encode())
        digest.update(b"]")
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

        Raises InputError for the packed 4- and 6-bit dtypes, and above ARRAY_CAP.
        """
        entry = self.tensors[name]
        if entry.nbytes > ARRAY_CAP:
            raise InputError(f"{self.folder / entry.shard}: {name}: {entry.nbytes} bytes are too many for its place")
        if DTYPE_BITS[entry.dtype] < 8:
            raise InputError(f"{self.folder / entry.shard}: {name}: packed dtype {entry.dtype} has no numpy form")
        return decode(self.read(name), entry.dtype).reshape(entry.shape)

    def _pread(self, entry: TensorEntry, start: int, size: int) -> bytes:
        path = self.folder / entry.shard
        parts: list[bytes] = []
        with path.open("rb", buffering=0) as file:
            while size > 0:
                try:
                    part = os.pread(file.fileno(), min(size, 1 << 30), start)
                except OSError as error:
                    raise InputError(f"{path}: {error.strerror or error}") from error
                if not part:
                    raise InputError(f"{path}: {entry.name}: the file has shrunk to {start} bytes")
                parts.append(part)
                start += len(part)
                size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read config, index and all headers of a checkpoint folder; no tensor is read.

    Memory: no size that a file declares is believed before it was compared with the file's own. JSON takes at most
    about 30 bytes for each byte of a file, whose length HEADER_CAP limits; headers of real models take 10. Raises
    InputError, naming the file and the tensor, for anything missing, truncated, contradictory or malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    config = read_json(folder / CONFIG)
    index = read_json(folder / INDEX) if os.path.lexists(folder / INDEX) else None
    weight_map = check_weight_map(folder, index) if index is not None else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [find_single(folder)]
    missing = [name for name in names if not os.path.exists(folder / name)]
    if missing:
        what = "a link to nothing" if os.path.islink(folder / missing[0]) else "not there"
        count = f"{len(missing)} of {len(names)} are missing"
        raise InputError(f"{folder}: missing shard {missing[0]:.80}: {what} ({count})")

    shards = tuple(read_shard(folder / name) for name in names)
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for entry in shard.tensors:
            other = tensors.setdefault(entry.name, entry)
            if other is not entry:
                raise InputError(f"{shard.path}: tensor {entry.name!r} is also in {other.shard}")
    if index is not None and weight_map is not None:
        compare_with_index(folder / INDEX, weight_map, tensors)
        # The same map of the headers' own strings: 140,000 names are held once.
        index["weight_map"] = {tensors[key].name: tensors[key].shard for key in weight_map}
    return Checkpoint(folder, config, shards, tensors, index)


def find_single(folder: Path) -> str:
    """The only shard's name in a folder that has no index."""
    if os.path.lexists(folder / SINGLE):
        return SINGLE
    names = sorted(path.name for path in folder.iterdir())
    for name in [name for name in names if name.endswith(".safetensors")]:
        raise InputError(f"{folder}: {shown(name)} is there, but neither {SINGLE} nor {INDEX}")
    for name in [name for name in names if name.removesuffix(".index.json").endswith(PICKLES)]:
        raise InputError(f"{folder}: {shown(name)} is a pickle, which is never read; convert it to safetensors first")
    raise InputError(f"{folder}: no safetensors file")


def check_weight_map(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    path, weight_map = folder / INDEX, index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map is missing or empty")
    if not isinstance(index.get("metadata") or {}, dict):
        raise InputError(f"{path}: metadata is not an object")
    examples = {name if isinstance(name, str) else None: (key, name) for key, name in weight_map.items()}
    for key, name in examples.values():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise InputError(
                f"{path}: {shown(key)} is in {shown(name)}, not a safetensors file; pickles are never read"
            )
        if os.path.basename(name) != name or "\\" in name or not name.isprintable():
            raise InputError(f"{path}: {shown(key)} is in {shown(name)}, which is not a file of this folder")
    if os.path.lexists(folder / SINGLE) and SINGLE not in examples:
        raise InputError(f"{folder}: has both {SINGLE} and {INDEX}, which does not name it; remove one")
    return weight_map


def compare_with_index(path: Path, weight_map: dict[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for key, name in weight_map.items():
        if key not in tensors:
            raise InputError(f"{path}: {shown(key)} should be in {name}, which does not hold it")
        if tensors[key].shard != name:
            raise InputError(f"{path}: {key!r} should be in {name}, but is in {tensors[key].shard}")
    for key, entry in tensors.items():
        if key not in weight_map:
            raise InputError(f"{path}: {key!r} of {entry.shard} is not listed")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, such as config.json; duplicate keys and nesting beyond DEPTH_CAP are refused."""
    if (size := regular_size(path)) > HEADER_CAP:
        raise InputError(f"{path}: {size} bytes, more than the limit of {HEADER_CAP}")
    value = parse_json(read_start(path, size)[0], str(path))
    level: list[Any] = [value]
    for _ in range(DEPTH_CAP):
        holders = (list(holder.values()) if isinstance(holder, dict) else holder for holder in level)
        level = [item for holder in holders for item in holder if isinstance(item, (dict, list))]
    if level:
        raise InputError(f"{path}: not valid JSON: nested more than {DEPTH_CAP} deep")
    return value


def parse_json(data: bytes, source: str, strict: bool = False) -> dict[str, Any]:
    """A JSON object. Refused: duplicate keys, strings that are not Unicode, too deep nesting. strict: also NaN and
    Infinity, which Python writes into configs, and minus zero, which is no integer of JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            count = Counter(key for key, _ in pairs)
            raise ValueError(f"duplicate key {shown(next(key for key in count if count[key] > 1))}")
        return found

    def number(text: str) -> int:
        if text in ("-0", "NaN", "Infinity", "-Infinity"):
            raise ValueError(f"{text} is not a number here")
        return int(text)

    constant, whole = (number, number if b"-0" in data else None) if strict else (None, None)
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_int=whole)
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be encoded
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
    return status.st_size


def read_start(path: Path, *sizes: int) -> list[bytes]:
    """The first bytes of a file in parts of these sizes, all of which the file was seen to have."""
    try:
        with path.open("rb") as file:
            parts = [file.read(size) for size in sizes]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if tuple(map(len, parts)) != sizes:
        raise InputError(f"{path}: the file has shrunk to {sum(map(len, parts))} bytes")
    return parts


def read_shard(path: Path) -> Shard:
    """A file's header, read and checked. Raises InputError."""
    size = regular_size(path)
    length = header_length(read_start(path, min(8, size))[0], path, size)
    return parse_header(read_start(path, 8, length)[1], path, size)


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


def shown(value: Any) -> str:
    """repr of anything that JSON holds, cut to 80 printable characters; short work however large the value."""
    return f"{repr(value[:80]) if isinstance(value, str) else reprlib.repr(value):.80}"


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
