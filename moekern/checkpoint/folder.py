"""A safetensors checkpoint folder: every header is checked once at the door, and everything after trusts it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moekern.checkpoint.contents import CONFIG, INDEX, PICKLES, SINGLE, Contents, contents
from moekern.checkpoint.dtypes import decode
from moekern.checkpoint.header import ARRAY_CAP, DTYPE_BITS, Shard, TensorEntry, read_shard
from moekern.checkpoint.strict_json import read_json, shown
from moekern.checkpoint.unlisted import unlisted_shards
from moekern.errors import InputError

__all__ = ["CONFIG", "INDEX", "MANIFEST", "PLAN_FILE", "SINGLE", "Checkpoint", "open_checkpoint"]

MANIFEST = "moekern_manifest.jsonl"  # a line for each shard: its size, and its tensors' checksums
PLAN_FILE = "moekern_plan.json"  # in a pruned folder: the plan it was made by
HUB_FOLDER = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/(?:snapshots/)?([0-9a-f]{40})$")
FINGERPRINT_TENSORS, FINGERPRINT_BYTES = 64, 4096

ReadData = Callable[[Path, TensorEntry, int, int], bytes]  # (file, tensor, first byte, bytes)


def read_data(path: Path, entry: TensorEntry, start: int, size: int) -> bytes:
    """Bytes of a tensor's file, read with pread. Raises InputError if it has shrunk."""
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


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and one or more shards, in name order. index is None for a single file.

    A shard's tensors are those that count: a tensor that another shard supersedes is not among them. strays are
    safetensors files of the folder that are no shards, and why; notes say what the folder's files left open and how it
    was understood, a line each.
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorEntry]
    index: dict[str, Any] | None
    strays: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    read_data: ReadData = field(default=read_data, repr=False)  # another where only headers are in the folder

    @property
    def repository(self) -> str | None:
        """ID@COMMIT where the folder holds what was downloaded, or read, of a repository of the hub."""
        found = HUB_FOLDER.search(self.folder.as_posix())
        return f"{found[1]}/{found[2]}@{found[3]}" if found else None

    @property
    def name(self) -> str:
        """The repository and its commit, or the folder."""
        return self.repository or str(self.folder)

    @cached_property
    def contents(self) -> Contents:
        """What the folder's other files are."""
        return contents(self.folder, {shard.name for shard in self.shards}, self.strays)

    @property
    def side_files(self) -> tuple[str, ...]:
        """Names, relative to the folder, of the files that belong to the model but hold neither weights nor config."""
        return self.contents.side

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
        for entry, start, size in sampled(self.tensors):
            digest.update(self.read_data(self.folder / entry.shard, entry, start, size))
        return digest.hexdigest()

    @property
    def config_sha256(self) -> str:
        """Of config.json's values: they decide what is computed with the tensors that the fingerprint stands for."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def read(self, name: str) -> bytes:
        """The bytes of one tensor, read with pread. Raises InputError if the shard has shrunk meanwhile."""
        entry = self.tensors[name]
        return self.read_data(self.folder / entry.shard, entry, entry.start, entry.nbytes)

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


def sampled(tensors: Mapping[str, TensorEntry]) -> list[tuple[TensorEntry, int, int]]:
    """The tensors that a fingerprint looks into, with the first byte and the number of bytes that it reads of each."""
    names, of = sorted(tensors), FINGERPRINT_TENSORS
    entries = [tensors[names[i]] for i in sorted({i * len(names) // of for i in range(of)})]
    sizes = [min(FINGERPRINT_BYTES, entry.nbytes) for entry in entries]
    return [(entry, entry.start + (entry.nbytes - n) // 2, n) for entry, n in zip(entries, sizes, strict=True)]


def open_checkpoint(folder: str | Path, read: Callable[[Path], Shard] = read_shard) -> Checkpoint:
    """Read config, index and, with `read`, all headers of a checkpoint folder; no tensor is read.

    Memory: no size that a file declares is believed before it was compared with the file's own. JSON takes at most
    about 30 bytes for each byte of a file, whose length HEADER_CAP limits; headers of real models take 10. Raises
    InputError, naming the file and the tensor, for anything missing, truncated, contradictory or malformed.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    config = read_json(folder / CONFIG)
    index = read_json(folder / INDEX) if os.path.lexists(folder / INDEX) else None
    weight_map = check_weight_map(folder, index) if index is not None else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [find_single(folder)]
    there = set(os.listdir(folder))  # once: a hostile index names a million files
    missing = [name for name in names if name not in there or not os.path.exists(folder / name)]
    if missing:
        what = "a link to nothing" if os.path.islink(folder / missing[0]) else "not there"
        count = f"{len(missing)} of {len(names)} are missing"
        raise InputError(f"{folder}: missing shard {missing[0]:.80}: {what} ({count})")

    listed = weight_map or {}
    shards, tensors, superseded = join([read(folder / name) for name in names], listed)
    if index is not None and weight_map is not None:
        compare_with_index(folder / INDEX, weight_map, tensors)
    more, strays = unlisted_shards(folder, config, set(names), tensors, read)
    for shard in more:
        tensors.update((entry.name, entry) for entry in shard.tensors)
    if index is not None:
        # The same map of the headers' own strings: 140,000 names are held once.
        index["weight_map"] = {entry.name: entry.shard for entry in tensors.values()}
    notes = (*superseded, *(taken_line(shard) for shard in more))
    shards = tuple(sorted((*shards, *more), key=lambda shard: shard.name))
    return Checkpoint(folder, config, shards, tensors, index, strays, notes)


def join(
    shards: Sequence[Shard], listed: Mapping[str, str]
) -> tuple[tuple[Shard, ...], dict[str, TensorEntry], list[str]]:
    """Shards without the tensors that another supersedes, all tensors, and a note for each pair of files.

    A loader that reads every file of the index in name order ends with the last file's tensor, one that looks each
    tensor up with the file that the index names. Where both are the same file it supersedes the others; else the
    checkpoint is ambiguous. Raises InputError.
    """
    tensors: dict[str, TensorEntry] = {}
    older: dict[str, list[str]] = {}  # tensor -> shards that hold a copy which is not the last
    for shard in shards:
        for entry in shard.tensors:
            if entry.name in tensors:
                older.setdefault(entry.name, []).append(tensors[entry.name].shard)
            tensors[entry.name] = entry
    stale: dict[tuple[str, str], list[str]] = {}
    for name, holders in older.items():
        last, wanted = tensors[name].shard, listed.get(name)
        if wanted != last:
            raise InputError(
                f"{shards[0].path.parent / last}: tensor {shown(name)} is also in {holders[0]}; the index names "
                f"{wanted or 'neither'}, loaders that read all files take the last one, {last}: take it out of one of "
                "the two, or rename the file that the index names so that it comes last"
            )
        for holder in holders:
            stale.setdefault((last, holder), []).append(name)
    notes = [
        f"{new}: supersedes what {old} holds of the same name, as the index says ({names[0]}"
        f"{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
        for (new, old), names in stale.items()
    ]
    old = {name for _, name in stale}
    counting = [
        replace(shard, tensors=tuple(entry for entry in shard.tensors if tensors[entry.name] is entry))
        if shard.name in old
        else shard
        for shard in shards
    ]
    return tuple(counting), tensors, notes


def taken_line(shard: Shard) -> str:
    return f"{shard.name}: no index names it; taken for the MTP layer that config.json counts"


def find_single(folder: Path) -> str:
    """The only shard's name in a folder that has no index."""
    if os.path.lexists(folder / SINGLE):
        return SINGLE
    names = sorted(path.name for path in folder.iterdir())
    for name in [name for name in names if name.endswith(".safetensors")]:
        way_out = f"name an only file {SINGLE}, or write the index of several"
        raise InputError(f"{folder}: {shown(name)} is there, but neither {SINGLE} nor {INDEX}; {way_out}")
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
        raise InputError(
            f"{folder}: has both {SINGLE} and {INDEX}, which does not name it; remove one "
            f"(of the two, transformers reads {SINGLE})"
        )
    return weight_map


def compare_with_index(path: Path, weight_map: dict[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for key, name in weight_map.items():
        if key not in tensors:
            raise InputError(f"{path}: {shown(key)} should be in {name}, which does not hold it")
        if tensors[key].shard != name:
            raise InputError(
                f"{path}: {shown(key)} should be in {name}, but is in {tensors[key].shard}; correct one of them"
            )
    for key, entry in tensors.items():
        if key not in weight_map:
            raise InputError(
                f"{path}: {shown(key)} of {entry.shard} is not listed; add it to weight_map, or take it out of the file"
            )
