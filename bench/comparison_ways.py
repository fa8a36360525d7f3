"""The rows of `bench.comparison`: which plan each makes, and which compute weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bench.refit import FITS, SHAPED
from moekern.criteria.table import CRITERIA, HTS_FAMILY, MC_SUITE
from moekern.merging.groups import METHODS, merging_plan
from moekern.plan.document import Plan
from moekern.plan.make import make_plan
from moekern.statistics.file import Statistics

PUBLISHED = (
    *(row.name for row in (*MC_SUITE, *HTS_FAMILY)),
    "hope", "hope_all_tokens", "rcs", "rcs_loo", "razor", "omp", "easy_ep", "mone", "aimer", "shape", "stun", "naee",
    "diet", "random",
)  # fmt: skip
CONSTANTS = ("dimensions", "constants")  # tiers
TRAINED = "trained"
KINDS = ("choice", "constants", "merged", "masks", "refitted", TRAINED, "twin")


@dataclass(frozen=True)
class Way:
    """A row that a plan says all of. plan: (sums, share, seed) -> Plan."""

    kind: str
    tiers: tuple[str, ...]
    plan: Callable[[Statistics, float, int], Plan]


def planned(criterion: str) -> dict[str, Way]:
    """Name -> way; `criterion` chooses for those that need a choice."""
    ways = {name: Way("choice", CRITERIA[name].tiers, partial(_chosen, name)) for name in (criterion, *PUBLISHED)}
    tiers = tuple(dict.fromkeys((*CONSTANTS, *CRITERIA[criterion].tiers)))
    for base, constant in (("mone", "mean"), (criterion, "mean"), (criterion, "least-squares")):
        ways[f"{base}, {constant} constants"] = Way("constants", tiers, partial(_chosen, base, constant=constant))
    for method, row in METHODS.items():
        tiers = tuple(dict.fromkeys((*row.tiers, *CRITERIA[row.criterion].tiers)))
        for word, align in (("merged", "none"), ("merged, channels matched", "weights")):
            ways[f"{method}, {word}"] = Way("merged", tiers, partial(_merged, method, align))
    return ways


def _chosen(name: str, sums: Statistics, share: float, seed: int, constant: str | None = None) -> Plan:
    return make_plan(sums, name, share, seed=seed, replaced=constant)


def _merged(method: str, align: str, sums: Statistics, share: float, seed: int) -> Plan:
    return merging_plan(sums, method, share, align=align)


def fitted() -> dict[str, str]:
    """Rows that compute weights -> kind."""
    names = [prefix + name for name in FITS for prefix in ("", SHAPED)]
    return {
        "masks": "masks", **dict.fromkeys(names, "refitted"),
        f"dropped, {TRAINED}": TRAINED, f"{names[-1]}, {TRAINED}": TRAINED,
    }  # fmt: skip
