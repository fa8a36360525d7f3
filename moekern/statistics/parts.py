"""A part of a calibration in a file of its own, and the whole that all parts make: the bytes of one process.

The file of a part is one of statistics in which each segment of the text is a domain of its own, "<domain>/<segment>".
Its header's `part` says which part of how many it is, and what stands in the header of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.errors import InputError
from moekern.statistics.disk import Layers, StoredLayers, open_layers
from moekern.statistics.file import MadeLayer, MadeLayers, Statistics
from moekern.statistics.folding import Folding
from moekern.statistics.header import PART, header_problem
from moekern.statistics.layer import LayerStatistics
from moekern.team import Part

Segments = Mapping[str, tuple[str, int]]  # name in the file -> domain and number of the segment


def part_header(whole: Mapping[str, Any], part: Part, segments: Segments, tokens: Mapping[str, int]) -> dict[str, Any]:
    """The header of a part's file, `tokens` by the names of its segments; `whole` is that of the calibration."""
    kept = {"domains": whole["domains"], "tokens": whole["tokens"]}
    own = {"number": part.number, "of": part.of, "segments": [list(each) for each in segments.values()], **kept}
    return {**whole, "domains": list(segments), "tokens": dict(tokens), PART: own}


@dataclass(frozen=True)
class PartFile:
    """One part, opened."""

    path: Path
    part: Part
    whole: Mapping[str, Any]  # the header of the calibration
    segments: Segments
    tokens: Mapping[str, int]  # of each segment, by its name in the file
    layers: StoredLayers


def is_part(path: Path) -> bool:
    """Whether a readable statistics file is one of a part."""
    return PART in open_layers(path)[0]


def open_part(path: Path) -> PartFile:
    """A part's file; numbers are read and checked when they are asked for. Raises InputError for any other file."""
    header, layers = open_layers(path)
    own = header.pop(PART, None)
    if own is None:
        raise InputError(f"{path}: statistics of their own, no part of a calibration; merge them without parts")
    try:
        part, pairs = Part(int(own["number"]), int(own["of"])), [(str(d), int(n)) for d, n in own["segments"]]
        whole = {**header, "domains": own["domains"], "tokens": own["tokens"]}
        segments = dict(zip(header["domains"], pairs, strict=True))
        named = all(name == f"{domain}/{number}" for name, (domain, number) in segments.items())
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: header: part: not as moekern writes it") from None
    problem = header_problem(whole) or ("" if named and 1 <= part.number <= part.of else "not as moekern writes it")
    if problem:
        raise InputError(f"{path}: header: part: {problem}")
    return PartFile(path, part, whole, segments, header["tokens"], layers)


def load_part(path: Path) -> Statistics:
    """What a part has measured, its segments as domains."""
    return Statistics(*open_layers(path))


@dataclass(frozen=True, eq=False)
class FoldedLayer(MadeLayer):
    """One layer of all parts, whose segments are added up."""

    places: Mapping[str, Sequence[tuple[int, PartFile, str]]]  # domain -> segment, where it is, and its name there

    def __getitem__(self, domain: str) -> LayerStatistics:
        fold = Folding()
        for number, part, name in self.places[domain]:
            try:
                fold.add(number, part.layers[self.key][name])
            except ValueError as error:
                raise InputError(f"{part.path}: layer {self.key}: {error}") from error
        return fold.total()


@dataclass(frozen=True, eq=False)
class FoldedLayers(MadeLayers):
    """The layers of all parts; nothing is added before it is asked for."""

    places: Mapping[str, Sequence[tuple[int, PartFile, str]]]
    sizes: Layers

    def __getitem__(self, key: str) -> FoldedLayer:
        return FoldedLayer(key, list(self.sizes[key]), self.places)


def merge_parts(paths: Sequence[Path]) -> Statistics:
    """The statistics of a calibration of which each file is a part: the bytes that one process would have made.

    Raises InputError for a part that is missing or comes twice, or is of another calibration.
    """
    parts = [open_part(path) for path in paths]
    first = parts[0]
    of: dict[int, PartFile] = {}
    for each in parts:
        if (other := of.setdefault(each.part.number, each)) is not each:
            raise InputError(f"merge: {other.path} and {each.path} are both part {each.part.number}; leave one out")
        for name in first.whole:
            if each.part.of != first.part.of or each.whole.get(name) != first.whole[name]:
                what = name if each.part.of == first.part.of else "number of parts"
                raise InputError(f"merge: {each.path}: of another calibration than {first.path}: its {what} differs")
    missing = [str(number) for number in range(1, first.part.of + 1) if number not in of]
    if missing:
        several = f"parts {', '.join(missing)} of {first.part.of} are" if len(missing) > 1 else ""
        one = f"part {missing[0]} of {first.part.of} is"
        raise InputError(f"merge: {several or one} missing; give the files of all parts")
    places = {d: _places(parts, d) for d in first.whole["domains"]}
    _check_whole(parts, places)
    sizes = {
        key: {domain: found[0][1].layers[key].sizes[found[0][2]] for domain, found in places.items()}
        for key in first.layers
    }
    return Statistics(first.whole, FoldedLayers(places, sizes))


def _places(parts: Sequence[PartFile], domain: str) -> list[tuple[int, PartFile, str]]:
    """Where the segments of a domain are, in their order."""
    found = [(n, part, name) for part in parts for name, (d, n) in part.segments.items() if d == domain]
    return sorted(found, key=lambda place: place[0])


def _check_whole(parts: Sequence[PartFile], places: Mapping[str, Sequence[tuple[int, PartFile, str]]]) -> None:
    """Raise InputError unless each segment is there once, and all have the same layers and sums."""
    first = parts[0]
    for domain, found in places.items():
        tokens = sum(part.tokens[name] for _, part, name in found)
        whole = tokens == first.whole["tokens"][domain]
        if [number for number, *_ in found] != list(range(len(found))) or not found or not whole:
            raise InputError(f"merge: the parts do not hold all segments of domain {domain} once")
    for part in parts:
        if set(part.layers) != set(first.layers):
            raise InputError(f"merge: {part.path}: its layers differ from those of {first.path}")
        for key, layer in part.layers.items():
            expected = next(iter(first.layers[key].sizes.values()))
            for name in part.segments:
                problem = expected.differs(layer.sizes[name]) if name in layer.sizes else f"no segment {name}"
                if problem:
                    raise InputError(f"merge: {part.path}: layer {key}: {problem}")
