"""Which experts tell one class of text from others: a document, made of statistics by domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekern import files
from moekern.architectures.layout import Layout
from moekern.architectures.twins import same_routers
from moekern.checkpoint.strict_json import check_depth, parse_json, read_file, short
from moekern.errors import InputError
from moekern.layer_keys import natural
from moekern.plan.document import SIZE_CAP, check_layers, pretty
from moekern.plan.guards import DISTINCTIVE, Experts, by_layer, contrast, ranked
from moekern.statistics.file import Statistics

FORMAT = "moekern.contrast/1"


@dataclass(frozen=True)
class Contrast:
    """How much more often a token of one class chooses each expert than a token of the others (MoTE's differential map,
    arXiv:2502.11096): layer key -> E differences of shares, from -1 to 1; and where that came from."""

    layers: Mapping[str, Sequence[float]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(statistics: Statistics, domains: Sequence[str], against: Sequence[str] = ()) -> Contrast:
        """Domains of a statistics file against `against`, or all others. Raises InputError as `guards.contrast`."""
        found = contrast(statistics, domains, "--of", against)
        rest = list(against) or [name for name in statistics.domains if name not in domains]
        header = statistics.header
        provenance = {key: header[key] for key in ("fingerprint", "routers", "family") if header.get(key)}
        provenance |= {"of": list(domains), "against": rest, "statistics_sha256": statistics.sha256}
        return Contrast(found, provenance | {"tokens": {name: header["tokens"][name] for name in (*domains, *rest)}})

    def distinctive(self, count: int = DISTINCTIVE) -> Experts:
        """Layer -> the numbers of so many experts that the class uses most above the others, of all layers together;
        fewer where it uses no more of them more often."""
        return by_layer(ranked(self.layers)[:count])

    def save(self, path: str | Path, *, new: bool = False) -> bool:
        """Write it as JSON; with `new` only where nothing is, or the same bytes."""
        document = {"format": FORMAT, "layers": dict(self.layers), "provenance": dict(self.provenance)}
        return files.write_bytes(path, (pretty(document) + "\n").encode(), new=new)

    @staticmethod
    def load(path: str | Path) -> Contrast:
        """Read one, made by moekern or by hand. Raises InputError, naming file and layer, for anything odd."""
        document = parse_json(read_file(Path(path), SIZE_CAP), str(path), strict=True)
        check_depth(document, str(path))
        layers, provenance = document.get("layers"), document.get("provenance", {})
        if document.get("format") != FORMAT or not isinstance(layers, dict) or not layers:
            raise InputError(f'{path}: expected an object with "format": "{FORMAT}" and "layers"', kind="plan")
        if not isinstance(provenance, dict):
            raise InputError(f"{path}: provenance: expected an object, got {short(provenance)}", kind="plan")
        check_layers(layers, str(path))
        for key, row in layers.items():
            if not isinstance(row, list) or not row or not all(map(_is_number, row)):
                what = f"expected a list with a number an expert, got {short(row)}"
                raise InputError(f"{path}: layer {short(key)}: {what}", kind="plan")
        return Contrast({key: tuple(map(float, layers[key])) for key in sorted(layers, key=natural)}, provenance)

    def check(self, layout: Layout, routers: Mapping[str, str], source: str = "map") -> None:
        """Raise InputError unless it is of the model of `layout`, whose `routers` are as `twins.router_numbers` has
        them (those that are known)."""
        for key, row in self.layers.items():
            if key not in layout.layers:
                raise InputError(f"{source}: layer {short(key)} is not a MoE layer of this model", kind="plan")
            if len(row) != layout.layers[key].num_experts:
                what = f"{len(row)} numbers for {layout.layers[key].num_experts} experts"
                raise InputError(f"{source}: layer {key}: {what}", kind="plan")
        check_routers(self.provenance, routers, source)


def check_routers(provenance: Mapping[str, Any], routers: Mapping[str, str], source: str) -> None:
    """Raise InputError where a document names the numbers of other routers than these; layers that either does not know
    are passed over."""
    theirs = provenance.get("routers")
    known = {key: theirs[key] for key in routers if key in theirs} if isinstance(theirs, Mapping) else {}
    if known and not same_routers(known, {key: routers[key] for key in known}):
        why = "its routers hold other numbers than this model's"
        raise InputError(f"{source}: made for another model: {why}; without provenance.routers nothing is compared")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
