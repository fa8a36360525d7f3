"""A part of a calibration in a file of its own, and the whole that all parts make: the bytes of one process.

The file of a part is one of statistics in which each segment of the text is a domain of its own, "<domain>/<segment>".
Its header's `part` says which part of how many it is, and what stands in the header of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from moekern.checkpoint.header import TensorEntry
from moekern.errors import InputError
from moekern.statistics.disk import Layers, StoredLayers, open_layers
from moekern.statistics.file import MadeLayer, MadeLayers, Statistics
from moekern.statistics.folding import Folding
from moekern.statistics.header import PART, header_problem
from moekern.statistics.layer import LayerStatistics
from moekern.team import Part

Segments = Mapping[str, tuple[str, int]]  # name in the file -> domain and number of the segment


def part_header(
    whole: Mapping[str, Any], part: Part, segments: Segments, options: Mapping[str, Any], tokens: Mapping[str, int]
) -> dict[str, Any]:
    """The header of a part's file, `tokens` by the names of its segments; `whole` is that of the calibration, and
    `options` are those that all parts must share and that it does not name."""
    kept = {"domains": whole["domains"], "tokens": whole["tokens"]}
    own = {"number": part.number, "of": part.of, "segments": [list(each) for each in segments.values()], **kept}
    own["options"] = dict(options)
    return {**whole, "domains": list(segments), "tokens": dict(tokens), PART: own}


@dataclass(frozen=True)
class PartFile:
    """One part, opened."""

    path: Path
    part: Part
    whole: Mapping[str, Any]  # the header of the calibration
    options: Mapping[str, Any]  # that it does not name
    segments: Segments
    tokens: Mapping[str, int]  # of each segment, by its name in the file
    layers: StoredLayers


class Place(NamedTuple):
    """Where a segment of a domain is."""

    number: int
    part: PartFile
    name: str  # in the part's file

    def gradients(self, key: str) -> Mapping[str, TensorEntry]:
        """G of the segment in a layer, a tensor for each of the experts' matrices; empty where it was not measured."""
        return dict(sorted(self.part.layers[key].gradients[self.name].items()))


Finish = Callable[[str, Mapping[str, Sequence[Place]]], Mapping[str, Mapping[str, Tensor]]]  # domain -> fields


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
        options = dict(own.get("options", {}))
        named = all(name == f"{domain}/{number}" for name, (domain, number) in segments.items())
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: header: part: not as moekern writes it") from None
    problem = header_problem(whole) or ("" if named and 1 <= part.number <= part.of else "not as moekern writes it")
    if problem:
        raise InputError(f"{path}: header: part: {problem}")
    return PartFile(path, part, whole, options, segments, header["tokens"], layers)


def load_part(path: Path) -> Statistics:
    """What a part has measured, its segments as domains."""
    return Statistics(*open_layers(path))


@dataclass(frozen=True, eq=False)
class FoldedLayer(MadeLayer):
    """One layer of all parts, whose segments are added up."""

    places: Mapping[str, Sequence[Place]]  # domain -> its segments, in their order
    finish: Finish | None

    def __getitem__(self, domain: str) -> LayerStatistics:
        fold = Folding()
        for number, part, name in self.places[domain]:
            try:
                fold.add(number, part.layers[self.key][name])
            except ValueError as error:
                raise InputError(f"{part.path}: layer {self.key}: {error}") from error
        return replace(fold.total(), **self.finished.get(domain, {}))

    @cached_property
    def finished(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Domain -> fields that are made of all text."""
        return {} if self.finish is None else self.finish(self.key, self.places)


@dataclass(frozen=True, eq=False)
class FoldedLayers(MadeLayers):
    """The layers of all parts; nothing is added before it is asked for."""

    places: Mapping[str, Sequence[Place]]
    sizes: Layers
    finish: Finish | None

    def __getitem__(self, key: str) -> FoldedLayer:
        return FoldedLayer(key, list(self.sizes[key]), self.places, self.finish)


def merge_parts(paths: Sequence[Path], finish: Finish | None = None) -> Statistics:
    """The statistics of a calibration of which each file is a part: the bytes that one process would have made.

    `finish` makes of a layer's segments what is no sum, where gradients were measured.

    Raises InputError for a part that is missing or comes twice, or is of another calibration.
    """
    parts = [open_part(path) for path in paths]
    first = parts[0]
    of: dict[int, PartFile] = {}
    for each in parts:
        if (other := of.setdefault(each.part.number, each)) is not each:
            raise InputError(f"merge: {other.path} and {each.path} are both part {each.part.number}; leave one out")
        for name in first.options.keys() | each.options.keys():
            if each.options.get(name) != first.options.get(name):
                raise InputError(f"merge: {each.path}: of another calibration than {first.path}: its {name} differs")
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
    measured = any("gradient" in next(iter(layer.values())).tiers for layer in sizes.values())
    return Statistics(first.whole, FoldedLayers(places, sizes, finish if measured else None))


def _places(parts: Sequence[PartFile], domain: str) -> list[Place]:
    """Where the segments of a domain are, in their order."""
    found = [Place(n, part, name) for part in parts for name, (d, n) in part.segments.items() if d == domain]
    return sorted(found, key=lambda place: place.number)


def _check_whole(parts: Sequence[PartFile], places: Mapping[str, Sequence[Place]]) -> None:
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
    _check_gradients(places)


def _check_gradients(places: Mapping[str, Sequence[Place]]) -> None:
    """Raise InputError unless G of each segment is there, of the same matrices, where gradients were measured."""
    all_places = [place for found in places.values() for place in found]
    for key in all_places[0].part.layers:
        first = {name: entry.shape for name, entry in all_places[0].gradients(key).items()}
        for place in all_places:
            found, sums = place.gradients(key), place.part.layers[key].sizes[place.name]
            problem = (
                "" if {name: entry.shape for name, entry in found.items()} == first else "gradients of other shapes"
            )
            if bool(found) != ("gradient" in sums.tiers):
                problem = "gradients are missing" if not found else "gradients of no tier"
            if problem or any(entry.shape[0] != sums.num_experts for entry in found.values()):
                what = problem or "gradients of other experts"
                raise InputError(f"merge: {place.part.path}: layer {key}: segment {place.name}: {what}")
