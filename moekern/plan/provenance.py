"""Where a plan comes from: the keys that every plan made by moekern has, whoever chose the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moekern.plan.budgets import Budget
from moekern.plan.choose import TIE
from moekern.plan.document import NONUNIFORM, Plan, some_of
from moekern.plan.targets import Target
from moekern.router import keep_note
from moekern.version import __version__


def remarks(plan: Plan) -> list[str]:
    """What a person should know of a plan that moekern made, a line each: another number than asked for, and ties."""
    found, told = [], plan.provenance
    if isinstance(told["kept"], int):
        found.append(keep_note(told["keep"], told["kept"], told["num_experts"]))
    ties: Mapping[str, int] = told.get("ties", {})
    alike = [key for key, experts in ties.items() if experts == len(plan.layers[key].scores or ())]
    found.append(_tie_note("all scores are equal", alike, len(plan.layers)))
    some = [key for key in ties if key not in alike]
    found.append(_tie_note("experts tie where the choice ends", some, len(plan.layers)))
    return [line for line in found if line is not None]


def _tie_note(what: str, keys: Sequence[str], layers: int) -> str | None:
    if not keys:
        return None
    return f"{what} in {len(keys)} of {layers} layers ({some_of(keys)}): the lowest expert numbers stay"


@dataclass(frozen=True)
class Provenance:
    """What a plan was made from, and what was asked for.

    `statistics` is the sha256 of their file, None where they were not kept in one; `tokens` has how many each domain of
    the text has, of those that count; `marked` what the guards came to.
    """

    fingerprint: str
    criterion: str
    domains: Sequence[str]
    keep: float | int
    num_experts: int
    seed: int = 0
    statistics: str | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    marked: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[Target] = ()
    routers: Mapping[str, str] = field(default_factory=dict)  # by which a twin of the model is known

    def document(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """As a plan holds it, with the experts that each layer keeps."""
        uniform = len(set(counts.values())) == 1
        return (
            {
                "moekern": __version__,
                "fingerprint": self.fingerprint,
                "statistics": self.statistics,
                "criterion": self.criterion,
                "domains": list(self.domains),
                "tokens": {name: self.tokens[name] for name in self.domains if name in self.tokens},
                "keep": self.keep,
                "kept": next(iter(counts.values())) if uniform else dict(counts),
                "num_experts": self.num_experts,
                "tie": TIE,
                "seed": self.seed,
                "protect_super": self.marked.get("protect_super", False),
                "budget": {name: value for name, value in asdict(self.budget).items() if name != "allow_nonuniform"},
                "guards": {name: value for name, value in self.marked.items() if name != "protect_super"},
                "targets": [str(target) for target in self.targets],
            }
            | ({} if uniform else {NONUNIFORM: True})
            | ({"routers": dict(self.routers)} if self.routers else {})
        )
