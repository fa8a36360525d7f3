"""What calibration measures: sums per layer, domain and expert. Batches, domains and machines merge by adding."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moekern import files
from moekern.errors import InputError
from moekern.layer_keys import natural
from moekern.statistics.header import HEADER_KEY, IDENTITY, header_problem, merged_header, read_header
from moekern.statistics.layer import LayerStatistics as LayerStatistics
from moekern.statistics.layer import unmeasured


@dataclass(frozen=True, eq=False)
class Statistics:
    """A model's sums: `layers` maps layer key -> domain name -> LayerStatistics; `header` is what make_header gives.

    `sha256` is the digest of the file it was loaded from, None before it was saved.
    """

    header: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, LayerStatistics]]
    sha256: str | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names in the order of their numbers in the file."""
        return tuple(self.header["domains"])

    def layer(self, key: str, domains: Sequence[str] | None = None) -> LayerStatistics:
        """One layer's sums over the named domains (None: all). Raises InputError for an unknown layer or domain."""
        if key not in self.layers:
            raise InputError(f"statistics: no layer {key!r}; it holds {', '.join(self.layers)}")
        names = self.domains if domains is None else tuple(dict.fromkeys(domains))
        for name in names:
            if name not in self.domains:
                raise InputError(f"statistics: no domain {name!r}; it holds {', '.join(self.domains)}")
        parts = self.layers[key]
        some = next(iter(parts.values()))
        total = some.like()
        for name in names:
            if name in parts:
                total = total + parts[name]
        return total

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; the same statistics give the same bytes. The file appears whole or not at all."""
        problem = _problem(self.header, self.layers)
        if problem:
            raise ValueError(f"[Statistics.save] {problem}")
        number = {name: i for i, name in enumerate(self.domains)}
        tensors = {
            f"{key}/{number[domain]}/{name}": value.detach().cpu().clone()
            for key, parts in self.layers.items()
            for domain, sums in parts.items()
            for name, value in sums.tensors().items()
            if value.numel()
        }
        # One metadata key, because safetensors writes several in no fixed order.
        header = json.dumps(dict(self.header), sort_keys=True, ensure_ascii=False, allow_nan=False)
        with files.replacing(path) as temporary:
            save_file(tensors, temporary, metadata={HEADER_KEY: header})

    @staticmethod
    def load(path: str | Path) -> Statistics:
        """Read and check a statistics file. Raises InputError, naming file and tensor, for one that cannot be right."""
        if not Path(path).is_file():
            raise InputError(f"{path}: no such statistics file")
        try:
            with safe_open(path, framework="pt") as file:
                header = read_header(path, file.metadata() or {})
                names = file.keys()
                layers = _layers(path, header, {name: file.get_tensor(name).clone() for name in names})
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable statistics file ({error}); calibrate again") from error
        problem = _problem(header, layers)
        if problem:
            raise InputError(f"{path}: {problem}")
        return Statistics(header, layers, files.sha256(path))


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Add the statistics of one model gathered in several runs; domains and runs are united.

    Raises InputError when model, router, format, layers, experts or measured dimensions differ, or a file comes twice.
    """
    if not parts:
        raise InputError("merge: expected at least one statistics file")
    first = parts[0]
    known = [part.sha256 for part in parts if part.sha256 is not None]
    if len(set(known)) < len(known):
        raise InputError("merge: the same file is given twice; its tokens would count double")
    layers: dict[str, dict[str, LayerStatistics]] = {key: {} for key in first.layers}
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
        for key, domains in part.layers.items():
            _add_layer(layers[key], domains, first.layers[key], f"merge: part {number}, layer {key}")
    return Statistics(merged_header([part.header for part in parts]), layers)


def _add_layer(
    total: dict[str, LayerStatistics],
    added: Mapping[str, LayerStatistics],
    model: Mapping[str, LayerStatistics],
    where: str,
) -> None:
    expected = next(iter(model.values()))
    for domain, sums in added.items():
        problem = expected.differs(sums)
        if problem:
            raise InputError(f"{where}: {problem}; compared with part 1")
        total[domain] = total[domain] + sums if domain in total else sums


def _layers(
    path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, LayerStatistics]]:
    """Tensors by name <layer>/<domain number>/<field>, grouped; layers in natural order."""
    names = [f.name for f in fields(LayerStatistics)]
    numbers = {str(i): i for i in range(len(header["domains"]))}
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, rest = name.partition("/")
        domain, _, what = rest.partition("/")
        if what not in names or domain not in numbers:
            raise InputError(
                f"{path}: tensor {name!r} is not <layer>/<domain number>/<field> with a known field and one of "
                f"{len(numbers)} domains"
            )
        found.setdefault((key, numbers[domain]), {})[what] = tensor
    layers: dict[str, dict[str, LayerStatistics]] = {}
    for key, number in sorted(found, key=lambda pair: (natural(pair[0]), pair[1])):
        sums = found[key, number]
        if "count" in sums:
            sums = {**unmeasured(sums), **sums}
        missing = [name for name in names if name not in sums]
        if missing:
            raise InputError(f"{path}: tensor '{key}/{number}/{missing[0]}' is missing")
        layers.setdefault(key, {})[header["domains"][number]] = LayerStatistics(**sums)
    return layers


def _problem(header: Mapping[str, Any], layers: Mapping[str, Mapping[str, LayerStatistics]]) -> str | None:
    """Why this cannot be a statistics file; None when it can."""
    wrong = header_problem(header)
    if wrong:
        return f"header: {wrong}"
    if not layers:
        return "no layers"
    number = {name: i for i, name in enumerate(header["domains"])}
    for key, parts in layers.items():
        if "/" in key or not parts:
            return f"layer {key!r}: expected a key without '/' and at least one domain"
        first = next(iter(parts.values()))
        for domain, sums in parts.items():
            if domain not in number:
                return f"layer {key}: domain {domain!r} is not in the header"
            wrong = sums.problem(header["top_k"])
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
