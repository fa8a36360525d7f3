"""A statistics file: layers are written when they are done, in places known beforehand, and read one at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from moekern import files
from moekern.checkpoint.header import TensorEntry, read_shard
from moekern.errors import InputError
from moekern.layer_keys import natural
from moekern.statistics.header import FORMAT, HEADER_KEY, PART, read_header
from moekern.statistics.layer import LayerStatistics, unmeasured

DTYPES = {torch.int64: "I64", torch.float64: "F64"}
NUMPY = {"I64": "<i8", "F64": "<f8"}
BYTES = 8  # of a number of either type
GRADIENT = re.compile(r"gradient\.([0-9])\.([01])")  # of a part's file: a matrix's number, its hidden axis
WIDTH = 15  # digits of an offset or a length, with spaces before: the header's length is known before its numbers are
FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(LayerStatistics)}
_LISTS = tuple(name for name, f in FIELDS.items() if f.metadata["merge"] == "rows")

Layers = Mapping[str, Mapping[str, LayerStatistics]]  # layer key -> domain -> sums


Gradients = Mapping[str, Sequence[tuple[tuple[int, int, int], int]]]  # layer key -> shape, hidden axis of each matrix


@dataclass(frozen=True, eq=False)
class StoredLayer(Mapping[str, LayerStatistics]):
    """One layer of a file: domain -> its sums, read whenever they are asked for and not held; checked the first time,
    since the file is looked at every time and must be the one that it was."""

    path: Path
    made: tuple[int, ...]  # what the file system says of the file that was opened
    key: str
    top_k: int
    numbers: Mapping[str, int]  # domain -> its number in the file
    entries: Mapping[str, Mapping[str, TensorEntry]]  # domain -> field -> where it is
    sizes: Mapping[str, LayerStatistics]  # domain -> fields on the meta device
    gradients: Mapping[str, Mapping[str, TensorEntry]]  # domain -> G of a part's segment, float32 [E, rows, columns]
    checked: set[tuple[str, frozenset[str]]] = field(default_factory=set)  # domain and fields

    def __getitem__(self, domain: str) -> LayerStatistics:
        return self.read(domain)

    def __contains__(self, domain: object) -> bool:
        return domain in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, domain: str, tiers: tuple[str, ...] | None = None) -> LayerStatistics:
        """The sums of one domain; with `tiers`, of the routed tier and these, the others empty.

        Raises InputError, naming file and tensor, for values that cannot be.
        """
        found = self.entries[domain]
        wanted = {name: e for name, e in found.items() if tiers is None or tier_of(name) in ("routed", *tiers)}
        try:
            with self.path.open("rb", buffering=0) as file:
                if made(os.fstat(file.fileno())) != self.made:
                    raise ValueError("the file was changed after it was opened")
                held = {name: read_tensor(file, entry) for name, entry in wanted.items()}
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: layer {self.key}: {error}") from error
        sums = LayerStatistics(**unmeasured(held), **held)
        if (domain, frozenset(held)) not in self.checked:
            problem = sums.problem(self.top_k)
            if problem:
                raise InputError(f"{self.path}: tensor {self.key}/{self.numbers[domain]}/{problem}")
            self.checked.add((domain, frozenset(held)))
        return sums


@dataclass(frozen=True, eq=False)
class StoredLayers(Mapping[str, StoredLayer]):
    """The layers of a file, in natural order; nothing but its header is held."""

    path: Path
    made: tuple[int, ...]
    layers: Mapping[str, StoredLayer]

    def check(self) -> None:
        """Raise InputError when the file is not the one that was opened."""
        try:
            same = made(self.path.stat()) == self.made
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror or error}") from error
        if not same:
            raise InputError(f"{self.path}: the file was changed after it was opened")

    def __getitem__(self, key: str) -> StoredLayer:
        return self.layers[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def made(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def tier_of(name: str) -> str:
    """The tier that a field belongs to."""
    return str(FIELDS[name].metadata["tier"])


def read_tensor(file: BinaryIO, entry: TensorEntry) -> Tensor:
    """One tensor of an open file. Raises ValueError when the file has shrunk."""
    file.seek(entry.start)
    values = np.fromfile(file, NUMPY[entry.dtype], entry.nbytes // BYTES)
    if values.nbytes != entry.nbytes:
        raise ValueError(f"{entry.name}: the file has shrunk")
    return torch.from_numpy(values.reshape(entry.shape))


def open_layers(path: Path) -> tuple[dict[str, Any], StoredLayers]:
    """Header and layers of a file. Names, types and shapes are checked here, values when a layer is read.

    Raises InputError, naming file and tensor.
    """
    try:
        status = made(path.stat())
        shard = read_shard(path)
    except (InputError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(
            f"{path}: not a readable statistics file ({reason}); name one that `moekern calibrate` wrote, or "
            "calibrate again"
        ) from error
    header = read_header(path, shard.metadata)
    domains: list[str] = header["domains"]
    found: dict[tuple[str, int], dict[str, TensorEntry]] = {}
    gradients: dict[tuple[str, int], dict[str, TensorEntry]] = {}
    for entry in shard.tensors:
        key, number, name = _parsed(path, entry.name, len(domains), PART in header)
        (found if name in FIELDS else gradients).setdefault((key, number), {})[name] = entry
        if name not in FIELDS and (entry.dtype != "F32" or len(entry.shape) != 3):
            raise InputError(f"{path}: tensor {entry.name}: expected gradients, F32 [experts, rows, columns]")
    layers: dict[str, dict[int, dict[str, TensorEntry]]] = {}
    for key, number in sorted(found, key=lambda pair: (natural(pair[0]), pair[1])):
        layers.setdefault(key, {})[number] = found[key, number]
    if not layers:
        raise InputError(f"{path}: no layers")
    place = path.absolute()  # whatever folder the process is in when it reads
    known: dict[Any, LayerStatistics] = {}
    stored = {key: _layer(place, status, header, key, parts, known, gradients) for key, parts in layers.items()}
    return header, StoredLayers(place, status, stored)


def _parsed(path: Path, name: str, domains: int, part: bool) -> tuple[str, int, str]:
    """A tensor's name <layer>/<domain number>/<field>, in its parts."""
    key, _, rest = name.partition("/")
    number, _, what = rest.partition("/")
    if (what not in FIELDS and not (part and GRADIENT.fullmatch(what))) or number not in map(str, range(domains)):
        raise InputError(
            f"{path}: tensor {name!r} is not <layer>/<domain number>/<field> with a known field and one of {domains} "
            "domains"
        )
    return key, int(number), what


def _layer(
    path: Path,
    status: tuple[int, ...],
    header: Mapping[str, Any],
    key: str,
    parts: Mapping[int, dict[str, TensorEntry]],
    known: dict[Any, LayerStatistics],
    gradients: Mapping[tuple[str, int], Mapping[str, TensorEntry]],
) -> StoredLayer:
    domains = header["domains"]
    sizes: dict[str, LayerStatistics] = {}
    for number, entries in parts.items():
        shapes = tuple((name, entry.dtype, entry.shape) for name, entry in sorted(entries.items()))
        if shapes not in known:  # of most layers they are the same
            known[shapes] = _sizes(path, key, number, entries)
        sizes[domains[number]] = known[shapes]
    problem = layer_problem(header, key, sizes)
    if problem:
        raise InputError(f"{path}: {problem}")
    numbers = {domains[number]: number for number in parts}
    named = {domains[number]: entries for number, entries in parts.items()}
    own = {domain: gradients.get((key, number), {}) for domain, number in numbers.items()}
    return StoredLayer(path, status, key, header["top_k"], numbers, named, sizes, own)


def _sizes(path: Path, key: str, number: int, entries: Mapping[str, TensorEntry]) -> LayerStatistics:
    """The fields of one layer and domain on the meta device. Raises InputError for a wrong type and a missing field."""
    shapes: dict[str, Tensor] = {}
    for name, entry in entries.items():
        dtype = next((d for d, word in DTYPES.items() if word == entry.dtype), None)
        if dtype is None:
            wanted = DTYPES[FIELDS[name].metadata["dtype"]]
            raise InputError(f"{path}: tensor {entry.name}: expected dtype {wanted}, got {entry.dtype}")
        shapes[name] = torch.empty(entry.shape, dtype=dtype, device="meta")
    if "count" in shapes and shapes["count"].ndim == 1:
        shapes = {**unmeasured(shapes), **shapes}
    missing = [name for name in FIELDS if name not in shapes]
    if missing:
        raise InputError(f"{path}: tensor '{key}/{number}/{missing[0]}' is missing")
    return LayerStatistics(**shapes)


def layer_problem(header: Mapping[str, Any], key: str, parts: Mapping[str, LayerStatistics]) -> str | None:
    """Why the shapes of a layer's sums cannot stand in a file with this header; None when they can."""
    if "/" in key or not parts:
        return f"layer {key!r}: expected a key without '/' and at least one domain"
    first, number = next(iter(parts.values())), {name: i for i, name in enumerate(header["domains"])}
    for domain, sums in parts.items():
        if domain not in number:
            return f"layer {key}: domain {domain!r} is not in the header"
        wrong = sums.shape_problem()
        if wrong:
            return f"tensor {key}/{number[domain]}/{wrong}"
        differs = first.differs(sums)
        if differs:
            return f"layer {key}: domain {domain!r} does not agree with the others: {differs}"
    if not header["top_k"] <= first.num_experts <= header["num_experts"]:
        return (
            f"layer {key}: {first.num_experts} experts do not agree with top_k {header['top_k']} and num_experts "
            f"{header['num_experts']}"
        )
    return None


@dataclass
class StatisticsWriter:
    """Takes layers as they are done and puts their numbers where the finished file has them; holds none.

    `sizes` are the fields to come, by layer and domain, on any device: only their shapes count. Lists of coalitions,
    whose length nobody knows before (any shape announces one), follow after everything else, in the order in which they
    are written. The bytes of the finished file depend on nothing but header, sizes, numbers and that order. Room for
    all but these lists is taken at once: raises OSError where there is none.
    """

    file: BinaryIO
    header: Mapping[str, Any]
    sizes: Layers
    gradients: Gradients = field(default_factory=dict)  # of a part: kept of every domain, behind all else but lists
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    start: int = 0  # of the data
    end: int = 0
    left: Mapping[str, Any] | None = None  # what a stopped process had `kept`: its file goes on

    def __post_init__(self) -> None:
        lists: list[TensorEntry] = []
        at = 0
        for name, value, merge in self._planned():
            entry = TensorEntry(name, DTYPES[value.dtype], tuple(value.shape), "", at, at + value.numel() * BYTES)
            if merge == "rows":
                lists.append(TensorEntry(name, entry.dtype, (0, 0), "", 0, 0))
                continue
            self.entries[name], at = entry, entry.stop
        kept = [(key, domain) for key in sorted(self.gradients, key=natural) for domain in self.sizes[key]]
        for key, domain in kept:
            for number, (shape, axis) in enumerate(self.gradients[key]):
                name = self._name(key, domain, f"gradient.{number}.{axis}")
                self.entries[name] = entry = TensorEntry(name, "F32", shape, "", at, at + 4 * prod(shape))
                at = entry.stop
        self.start = len(self._text([*self.entries.values(), *lists]))
        self.end = at
        if self.left is not None:
            self._take_up(self.left)
            return
        os.truncate(self.file.fileno(), 0)
        files.reserve(self.file.fileno(), self.start + at)

    def kept(self) -> dict[str, Any]:
        """What a process must know, as JSON, that goes on with the file if this one is stopped; all that was written is
        on the disk now."""
        self.file.flush()
        os.fsync(self.file.fileno())
        lists = [(e.name, *e.shape) for e in self.entries.values() if e.name.rpartition("/")[2] in _LISTS]
        return {"written": sorted(self.written), "lists": lists}

    def _take_up(self, left: Mapping[str, Any]) -> None:
        """Raises ValueError where the file is not what is `left`."""
        for name, rows, columns in left["lists"]:
            stop = self.end + rows * columns * BYTES
            self.entries[name] = TensorEntry(name, DTYPES[torch.int64], (rows, columns), "", self.end, stop)
            self.end = stop
        self.written = set(left["written"])
        if not self.written <= self.entries.keys() or os.fstat(self.file.fileno()).st_size < self.start + self.end:
            raise ValueError("the statistics that go with it are not there")
        os.truncate(self.file.fileno(), self.start + self.end)  # lists that came after it

    def _planned(self) -> Iterator[tuple[str, Tensor, str]]:
        for key in sorted(self.sizes, key=natural):
            for domain, sums in self.sizes[key].items():
                for name, value in sums.tensors().items():
                    merge = FIELDS[name].metadata["merge"]
                    if value.numel():
                        yield self._name(key, domain, name), value, merge

    def _name(self, key: str, domain: str, name: str) -> str:
        return f"{key}/{self.header['domains'].index(domain)}/{name}"

    def write(self, key: str, domain: str, values: Mapping[str, Tensor]) -> None:
        """Fields of one layer and domain. Raises RuntimeError for a shape that was not announced."""
        for field_name, value in values.items():
            name, merge = self._name(key, domain, field_name), FIELDS[field_name].metadata["merge"]
            if merge == "rows":
                if not value.numel() or name in self.written:
                    continue
                stop = self.end + value.numel() * BYTES
                self.entries[name] = TensorEntry(name, DTYPES[value.dtype], tuple(value.shape), "", self.end, stop)
                self.end = stop
            elif not value.numel():
                continue
            entry = self.entries.get(name)
            if entry is None or entry.shape != tuple(value.shape):
                announced = None if entry is None else list(entry.shape)
                raise RuntimeError(f"statistics: {name}: shape {list(value.shape)} was announced as {announced}")
            self.file.seek(self.start + entry.start)
            self.file.write(value.detach().cpu().contiguous().numpy().astype(NUMPY[entry.dtype], copy=False).data)
            self.written.add(name)

    def keep(self, key: str, domain: str, totals: Sequence[Tensor]) -> None:
        """G of one layer and domain, float32, an expert at a time."""
        for (number, total), (_, axis) in zip(enumerate(totals), self.gradients[key], strict=True):
            name = self._name(key, domain, f"gradient.{number}.{axis}")
            self.file.seek(self.start + self.entries[name].start)
            for own in total:
                self.file.write(own.contiguous().numpy().astype("<f4", copy=False).data)
            self.written.add(name)

    def read(self, key: str, domain: str) -> LayerStatistics:
        """What was written of one layer and domain; zeros for what was announced and is still to come."""
        prefix = self._name(key, domain, "")
        self.file.flush()
        held = {
            name.removeprefix(prefix): read_tensor(
                self.file,
                TensorEntry(name, e.dtype, e.shape, "", self.start + e.start, self.start + e.stop),
            )
            for name, e in self.entries.items()
            if name.startswith(prefix) and name.removeprefix(prefix) in FIELDS
        }
        return LayerStatistics(**unmeasured(held), **held)

    def finish(self) -> None:
        """Write the header, once the numbers are on the disk: a file that has one is whole. Raises RuntimeError when an
        announced field did not come."""
        missing = [name for name in self.entries if name not in self.written]
        if missing:
            raise RuntimeError(f"statistics: {missing[0]} was announced and never measured")
        text = self._text(list(self.entries.values()))
        assert len(text) == self.start, "the header would run into the numbers"
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.seek(0)
        self.file.write(text)
        self.file.flush()

    def _text(self, entries: list[TensorEntry]) -> bytes:
        """The length of the header, the header, and spaces up to a whole number of words; offsets in offset order."""
        header = json.dumps({**self.header, "format": FORMAT}, sort_keys=True, ensure_ascii=False, allow_nan=False)
        parts = [f'"__metadata__":{json.dumps({HEADER_KEY: header}, ensure_ascii=False)}']
        for e in sorted(entries, key=lambda e: (e.start, e.stop)):
            shape = ",".join(f"{n:>{WIDTH}}" for n in e.shape)
            offsets = f"{e.start:>{WIDTH}},{e.stop:>{WIDTH}}"
            parts.append(f'{json.dumps(e.name)}:{{"dtype":"{e.dtype}","shape":[{shape}],"data_offsets":[{offsets}]}}')
        text = ("{" + ",".join(parts) + "}").encode()
        length = max(-(-len(text) // BYTES) * BYTES, self.start - BYTES)
        return length.to_bytes(8, "little") + text.ljust(length)
