"""Dropped experts that become constants: the router stays whole, and where it chooses such an expert, its gate times a
constant vector takes the place of gate times output (MoNE, arXiv:2507.00390)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekern.checkpoint.strict_json import short
from moekern.errors import InputError

ZERO, MEAN, LEAST_SQUARES = "zero", "mean", "least-squares"
TIERS: Mapping[str, str | None] = {ZERO: None, MEAN: "dimensions", LEAST_SQUARES: "constants"}  # kind -> what it reads
KINDS = tuple(TIERS)


@dataclass(frozen=True, slots=True)
class Replacement:
    """What stands for a dropped expert: zeros, the mean of its outputs over the tokens that it got, or the vector v
    that is nearest to them by sum g^2 ||f - v||^2, g its gate: sum g^2 f / sum g^2.

    statistics: sha256 of the file whose sums, over `domains` (None: all), give it; None of zeros, and where nothing
    binds a plan to one file.
    """

    constants: str
    statistics: str | None = None
    domains: tuple[str, ...] | None = None

    @property
    def tier(self) -> str | None:
        """The tier of statistics that the constants are made of."""
        return TIERS[self.constants]

    def document(self) -> dict[str, Any]:
        """As a plan holds it."""
        found = {"statistics": self.statistics, "domains": None if self.domains is None else list(self.domains)}
        return {"constants": self.constants} | {key: value for key, value in found.items() if value is not None}


def check_kind(kind: str, flag: str = "--replace") -> None:
    """Raise InputError for a name that is none of a constant's."""
    if kind not in KINDS:
        raise InputError(f"{flag} {kind:.40}: expected one of {', '.join(KINDS)}")


def replacement_of(value: Any, where: str) -> Replacement:
    """What a plan says under "replace". Raises InputError, which begins with `where`."""
    if not isinstance(value, dict) or value.get("constants") not in KINDS:
        known = f'an object with "constants": one of {", ".join(KINDS)}'
        raise InputError(f"{where}: expected {known}, got {short(value)}")
    for key in value:
        if key not in ("constants", "statistics", "domains"):
            raise InputError(f"{where}: unknown key {short(key)}; known are constants, statistics, domains")
    statistics, domains = value.get("statistics"), value.get("domains")
    if statistics is not None and not isinstance(statistics, str):
        raise InputError(f"{where}: statistics: expected the sha256 of a statistics file, got {short(statistics)}")
    if domains is not None and not _are_names(domains):
        raise InputError(f"{where}: domains: expected a list of names, got {short(domains)}")
    return Replacement(value["constants"], statistics, None if domains is None else tuple(domains))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
