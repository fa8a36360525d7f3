"""How well text covered the experts: what was routed to none, or to few tokens, says little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moekern.statistics.file import Statistics

THIN = 64  # tokens; fewer routed to an expert are taken as too few to judge it by
MANY = 0.05  # of the experts


@dataclass(frozen=True)
class Coverage:
    """Experts of all layers: how many there are, saw no token, and saw fewer than THIN."""

    tokens: int
    experts: int
    idle: int
    thin: int  # idle ones among them


def coverage(statistics: Statistics) -> dict[str, Coverage]:
    """Domain -> its coverage; "all" stands for the domains together, also where one is named so. One layer is read at a
    time."""
    counts: dict[str, list[Tensor]] = {"all": []}
    for key in statistics.layers:
        parts = {name: statistics.part(key, name, ()).count for name in statistics.layers[key]}
        whole = torch.stack(list(parts.values())).sum(0)
        for name, count in {**parts, "all": whole}.items():
            counts.setdefault(name, []).append(count)
    tokens = statistics.header["tokens"]
    tokens = {**tokens, "all": sum(tokens.values())}
    return {
        name: Coverage(
            tokens[name],
            sum(len(count) for count in each),
            sum(int((count == 0).sum()) for count in each),
            sum(int((count < THIN).sum()) for count in each),
        )
        for name, each in counts.items()
    }


def too_thin(found: Mapping[str, Coverage]) -> str | None:
    """The warning that too little text was measured; None where it was enough."""
    whole = found["all"]
    if whole.thin <= MANY * whole.experts:
        return None
    return (
        f"warning: too little text: {whole.thin} of {whole.experts} experts ({whole.thin / whole.experts:.0%}) were "
        f"measured on fewer than {THIN} tokens, so their scores are mostly chance; give more text, or raise --tokens"
    )
