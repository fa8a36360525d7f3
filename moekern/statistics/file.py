"""`Statistics`: a header and layers, held, read from a file or added up; saved, loaded and merged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moekern import files
from moekern.errors import InputError, check_type
from moekern.rows import Row, html_table, write_csv
from moekern.statistics.disk import (
    Layers,
    StatisticsWriter,
    StoredLayer,
    StoredLayers,
    layer_problem,
    open_layers,
)
from moekern.statistics.header import IDENTITY, PART, header_problem, merged_header
from moekern.statistics.layer import TIERS, LayerStatistics
from moekern.statistics.merges import UNKNOWN

COLUMNS = ("count", "gate_sum", "norm_sum", "gated_norm_sum")  # of to_rows


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """A model's sums: `layers` maps layer key -> domain name -> LayerStatistics; `header` is what make_header gives.

    The layers of a file or of a merge are read when they are asked for, one layer and domain at a time, and not held.
    """

    header: Mapping[str, Any]
    layers: Layers

    def __repr__(self) -> str:
        tokens = ", ".join(f"{count} tokens of {name}" for name, count in self.header["tokens"].items())
        tiers = "".join(f", {tier}" for tier in self.tiers)
        experts = f"{len(self.layers)} layers of up to {self.header['num_experts']} experts"
        return f"Statistics({self.header['family']}, {experts}; {tokens}; routed{tiers})"

    def _repr_html_(self) -> str:
        return html_table(repr(self), self.to_rows(list(self.layers)[:1]))

    def to_rows(self, layers: Sequence[str] | None = None) -> list[Row]:
        """A row a layer, domain and expert (None: of all layers): tokens routed to it, and the sums of its gates, of
        its output norms, and of gate x norm. One layer is read at a time."""
        return [
            {
                "layer": key, "domain": domain, "expert": e, "tokens": tokens, "gate_sum": gates, "norm_sum": norms,
                "gated_norm_sum": gated,
            }
            for key in (self.layers if layers is None else layers)
            for domain in self.layers[key]
            for sums in (self.part(key, domain, ()),)
            for e, (tokens, gates, norms, gated) in enumerate(
                zip(*(getattr(sums, name).tolist() for name in COLUMNS), strict=True)
            )
        ]  # fmt: skip

    def to_csv(self, path: str | Path) -> None:
        """Write the rows of all layers to a file."""
        write_csv(self.to_rows(), path)

    @cached_property
    def sha256(self) -> str | None:
        """Digest of the file that the layers are read from; None for others. Raises InputError when it was replaced."""
        if not isinstance(self.layers, StoredLayers):
            return None
        self.layers.check()
        return files.sha256(self.layers.path)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names in the order of their numbers in the file."""
        return tuple(self.header["domains"])

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that were measured in every layer and domain, beside the routed one."""
        measured = [set(sums.tiers) for parts in sizes_of(self.layers).values() for sums in parts.values()]
        return tuple(tier for tier in TIERS if all(tier in found for found in measured))

    def num_experts(self, key: str) -> int:
        """E of a layer, whose numbers are not read."""
        held = not isinstance(self.layers, (StoredLayers, MadeLayers))
        parts = self.layers[key] if held else sizes_of(self.layers)[key]
        return next(iter(parts.values())).num_experts

    def layer(
        self, key: str, domains: Sequence[str] | None = None, tiers: Sequence[str] | None = None
    ) -> LayerStatistics:
        """One layer's sums over the named domains (None: all). With `tiers` a file is read for these and the routed
        tier alone. Raises InputError for an unknown layer or domain, and for values that cannot be."""
        if key not in self.layers:
            raise InputError(f"statistics: no layer {key!r}; it holds {', '.join(self.layers)}")
        names = self.domains if domains is None else tuple(dict.fromkeys(domains))
        for name in names:
            if name not in self.domains:
                raise InputError(f"statistics: no domain {name!r}; it holds {', '.join(self.domains)}")
        total: LayerStatistics | None = None
        for name in names:
            if name in self.layers[key]:
                part = self.part(key, name, tiers)
                total = self.own(part) if total is None else total.absorb(part)
        return self.part(key, next(iter(self.layers[key])), tiers).like() if total is None else total

    def own(self, part: LayerStatistics) -> LayerStatistics:
        """The sums of a part, to be added to: what was read for this is nobody else's, what is held is copied."""
        read = isinstance(self.layers, (StoredLayers, MadeLayers))
        return part if read else LayerStatistics(**{name: value.clone() for name, value in part.tensors().items()})

    def part(self, key: str, domain: str, tiers: Sequence[str] | None = None) -> LayerStatistics:
        """The sums of one layer and domain, for `tiers` as in `layer`."""
        parts = self.layers[key]
        return (
            parts.read(domain, tuple(tiers)) if tiers is not None and isinstance(parts, StoredLayer) else parts[domain]
        )

    def save(self, path: str | Path, *, new: bool = False) -> None:
        """Write a safetensors file, a layer and domain at a time; the same statistics give the same bytes. The file
        appears whole or not at all; with `new`, where nothing is. Over the file that they were loaded from, load them
        again afterwards."""
        sizes = sizes_of(self.layers)
        problem = header_problem(self.header) or ("" if sizes else "no layers")
        problems = [problem] if problem else (layer_problem(self.header, key, sizes[key]) for key in sizes)
        for wrong in problems:
            if wrong:
                raise ValueError(f"[Statistics.save] {wrong}")
        with files.replacing(path, new=new) as temporary, temporary.open("r+b") as file:
            writer = StatisticsWriter(file, self.header, sizes)
            for key, parts in self.layers.items():
                for domain, sums in parts.items():
                    wrong = sums.problem(self.header["top_k"])
                    if wrong:
                        number = self.domains.index(domain)
                        raise ValueError(f"[Statistics.save] tensor {key}/{number}/{wrong}")
                    writer.write(key, domain, sums.tensors())
            writer.finish()

    @staticmethod
    def load(path: str | Path) -> Statistics:
        """Open a statistics file; its numbers are read and checked layer by layer, when they are asked for.

        Raises InputError, naming file and tensor, for one that cannot be right.
        """
        if not os.path.isfile(path := Path(path)):
            raise InputError(f"{path}: no such statistics file")
        header, layers = open_layers(path)
        if PART in header:
            raise InputError(f"{path}: one part of a calibration by parts; merge all of them first")
        return Statistics(header, layers)


def sizes_of(layers: Layers) -> Layers:
    """The shapes of all sums: of a file's, without reading them."""
    if isinstance(layers, StoredLayers):
        return {key: layer.sizes for key, layer in layers.items()}
    if isinstance(layers, MadeLayers):
        return layers.sizes
    return {key: {domain: sums.to("meta") for domain, sums in parts.items()} for key, parts in layers.items()}


class MadeLayers(Mapping[str, Mapping[str, LayerStatistics]]):
    """Layers whose sums are made when they are asked for, by whoever asks."""

    sizes: Layers  # on the meta device

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True, eq=False)
class MadeLayer(Mapping[str, LayerStatistics]):
    """One layer of them: domain -> its sums, made whenever they are asked for."""

    key: str
    domains: Sequence[str]

    def __contains__(self, domain: object) -> bool:
        return domain in self.domains

    def __iter__(self) -> Iterator[str]:
        return iter(self.domains)

    def __len__(self) -> int:
        return len(self.domains)


@dataclass(frozen=True, eq=False)
class MergedLayer(MadeLayer):
    """One layer of several statistics, added up."""

    parts: Sequence[Statistics]

    def __getitem__(self, domain: str) -> LayerStatistics:
        total: LayerStatistics | None = None
        for number, part in enumerate(self.parts, start=1):
            if domain in part.layers[self.key]:
                sums = part.part(self.key, domain)
                problem = None if total is None else total.other_weights(sums)
                if problem:
                    raise InputError(f"merge: part {number}, layer {self.key}: {problem}; compared with part 1")
                total = part.own(sums) if total is None else total.absorb(sums)
        if total is None:
            raise KeyError(domain)
        return total


@dataclass(frozen=True, eq=False)
class MergedLayers(MadeLayers):
    """The layers of several statistics of one model; nothing is added before it is asked for."""

    parts: Sequence[Statistics]
    sizes: Layers

    def __getitem__(self, key: str) -> MergedLayer:
        return MergedLayer(key, list(self.sizes[key]), self.parts)


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Add the statistics of one model gathered in several runs; domains and runs are united.

    Layers are added when they are asked for. Raises InputError when model, router, format, layers, experts or measured
    dimensions differ, or a file comes twice; when asked for, also where weights differ.
    """
    if not parts:
        raise InputError("merge: expected at least one statistics file")
    for part in parts:
        check_type("merge", part, Statistics)
    _check_apart(parts)
    return added(parts)


def added(parts: Sequence[Statistics]) -> Statistics:
    """As `merge`, of parts that are known to be of different text."""
    first = parts[0]
    total: dict[str, dict[str, LayerStatistics]] = {key: {} for key in first.layers}
    for number, part in enumerate(parts, start=1):
        for name in IDENTITY:
            if part.header.get(name) != first.header.get(name):
                raise InputError(
                    f"merge: part {number} has {name} {part.header.get(name)!r}, part 1 {first.header.get(name)!r}; "
                    "only runs of one model can be added"
                )
        if set(part.layers) != set(first.layers):
            odd = sorted(set(part.layers) ^ set(first.layers))
            raise InputError(f"merge: part {number} and part 1 measured different layers: {', '.join(odd)}")
        for key, sizes in sizes_of(part.layers).items():
            _unite(total[key], sizes, f"merge: part {number}, layer {key}")
    header = merged_header([part.header for part in parts])
    ordered = {key: {name: total[key][name] for name in header["domains"] if name in total[key]} for key in total}
    return Statistics(header, MergedLayers(parts, ordered))


def _check_apart(parts: Sequence[Statistics]) -> None:
    """Raise InputError where tokens would count double: a part is given twice, or two have measured the same text."""
    known = [part.sha256 or id(part) for part in parts]
    if len(set(known)) < len(known):
        raise InputError("merge: the same file is given twice; its tokens would count double")
    measured: dict[str, int] = {}
    for number, part in enumerate(parts, start=1):
        for text in {text for run in part.header["runs"] for text in _texts(run.get("data"))}:
            if measured.setdefault(text, number) != number:
                raise InputError(
                    f"merge: parts {measured[text]} and {number} measured the same text; its tokens would count double"
                )


def _texts(recipe: Any) -> set[str]:
    """What tells texts apart: the sha256 of each domain's token ids; in older files, the recipe."""
    sources = recipe.get("sources") if isinstance(recipe, dict) else None
    if sources is None:
        return set()
    ids = [each.get("ids_sha256") for each in sources.values()] if _are_objects(sources) else [None]
    named = {each for each in ids if isinstance(each, str)}
    return named if None not in ids else {json.dumps(recipe, sort_keys=True)}


def _are_objects(sources: Any) -> bool:
    return isinstance(sources, dict) and all(isinstance(each, dict) for each in sources.values())


def _unite(total: dict[str, LayerStatistics], added: Mapping[str, LayerStatistics], where: str) -> None:
    """Add the shapes of a part's layer to those of the parts before it."""
    for domain, sizes in added.items():
        expected = next(iter(total.values()), sizes)
        problem = expected.differs(sizes)
        if problem:
            raise InputError(f"{where}: {problem}; compared with part 1")
        mine = total.get(domain, sizes)
        # Weights that only some parts have looked at, and coalitions that only some have seen, are in the sum; halves
        # of the text that only some know are not.
        total[domain] = replace(mine, **{
            f.name: theirs
            for f in fields(sizes)
            for theirs in (getattr(sizes, f.name),)
            if not (theirs if f.metadata["merge"] in UNKNOWN else getattr(mine, f.name)).numel()
        })  # fmt: skip
