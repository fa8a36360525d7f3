"""Pairs of experts of a layer: who is chosen together, and whose outputs are alike."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from moekern.criteria.needs import cosines
from moekern.report.shares import largest, lift, strongest
from moekern.statistics.layer import LayerStatistics

TIERS = ("replay", "dimensions", "constants")  # that know outputs, the best first
PAIRS = 12  # of a layer's experts that are together beyond chance
MATRICES = 200_000  # pairs of experts in the matrices of one kind, all layers together
LIKE = {
    "replay": "Mean cosine of their outputs on the same tokens",
    "dimensions": "Cosine of their mean outputs",
    "constants": "Cosine of their mean outputs, weighted by gates",
    "routed": "Cosine of router logits, for outputs were not measured (--tier dimensions, or replay)",
}


def room(layers: int, experts: int) -> int:
    """How many experts of each layer the matrices show: all, or as many as there is room for."""
    n = min(experts, 2)
    while n < experts and layers * (n + 1) * n // 2 <= MATRICES:
        n += 1
    return n


def together(sums: LayerStatistics, count: int) -> dict[str, Any]:
    """The pairs that are most together beyond chance, and of the `count` most used experts, of equal ones the lowest
    numbers, the matrices of lift and of likeness."""
    tokens = int(sums.tokens)
    busy = sorted(sorted(range(sums.num_experts), key=lambda e: (-int(sums.count[e]), e))[:count])
    way, alike = likeness(sums)
    return {
        "nearest": [] if alike is None else nearest(alike),
        "strongest": [{"experts": [i, j], "tokens": n, "lift": value}
                      for i, j, n, value in strongest(sums.coactivation, tokens, PAIRS)],
        "experts": busy,
        "lift": known(lift(sums.coactivation[busy][:, busy], tokens)),
        "like": LIKE.get(way, ""),
        "alike": None if alike is None else known(alike[busy][:, busy]),
    }  # fmt: skip


def likeness(sums: LayerStatistics) -> tuple[str, Tensor | None]:
    """How alike outputs of experts are [E, E], -1 to 1, and the tier that tells, "" where none does; NaN where it is
    not known: on the diagonal, and of experts without outputs."""
    if int(sums.replay_tokens) and sums.output_cosine.numel():
        return "replay", (sums.output_cosine / sums.replay_tokens).clone().fill_diagonal_(torch.nan)
    means = {"dimensions": sums.value_sum, "constants": sums.gated_value_sum}
    way = next((name for name, values in means.items() if values.numel()), "routed" if sums.logit_gram.numel() else "")
    if not way:
        return way, None
    gram = sums.logit_gram if way == "routed" else means[way] @ means[way].T
    found = cosines(gram)
    unknown = gram.diagonal() <= 0
    found[unknown] = torch.nan
    found[:, unknown] = torch.nan
    return way, found.fill_diagonal_(torch.nan)


def nearest(alike: Tensor) -> list[dict[str, Any]]:
    """The pairs that are most alike, of equal ones the lowest numbers first."""
    E = len(alike)
    upper = torch.ones_like(alike).triu(1) > 0
    values = torch.where(upper & ~alike.isnan(), alike, -torch.inf).flatten()
    found = ((place, float(values[place])) for place in largest(values, PAIRS))
    return [{"experts": [place // E, place % E], "cosine": value} for place, value in found if isfinite(value)]


def known(table: Tensor) -> list[list[float | None]]:
    """Rows of numbers of four decimals, since there are many; None for NaN, which JSON lacks, and -1e9 for
    -infinity."""
    rows = table.clamp(min=-1e9).round(decimals=4).tolist()
    return [[None if value != value else value for value in row] for row in rows]
