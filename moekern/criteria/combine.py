"""Criteria made of criteria: sums of ranks or z-scores, sets united or intersected, domains served in turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekern.criteria.selectors import Selection
from moekern.criteria.table import Criterion
from moekern.errors import InputError
from moekern.statistics.layer import LayerStatistics


@dataclass(frozen=True, slots=True)
class Part:
    """One argument of a combinator: a criterion and its weight, or its share of the places."""

    criterion: Criterion
    weight: float = 1.0


def scored(criterion: Criterion, statistics: LayerStatistics) -> Tensor:
    """[E] float64; a selector scores the cost of dropping each expert alone."""
    if criterion.kind == "selector":
        found: Tensor = criterion.function(statistics, statistics.num_experts).scores
        return found
    return criterion.function(statistics)  # type: ignore[no-any-return]


def ranks(scores: Tensor) -> Tensor:
    """0 for the lowest to E - 1 for the highest; equal scores share the mean of their ranks."""
    below = (scores[None, :] < scores[:, None]).sum(1).double()
    equal = (scores[None, :] == scores[:, None]).sum(1).double()
    return below + (equal - 1) / 2


def zscores(scores: Tensor) -> Tensor:
    """(score - mean) / standard deviation over the experts; 0 where all are equal."""
    spread = scores.std(correction=0)
    return torch.where(spread > 0, (scores - scores.mean()) / spread, 0.0)


def rank(parts: Sequence[Part], statistics: LayerStatistics) -> Tensor:
    """Σ weight x rank of each criterion."""
    return torch.stack([p.weight * ranks(scored(p.criterion, statistics)) for p in parts]).sum(0)


def zscore(parts: Sequence[Part], statistics: LayerStatistics) -> Tensor:
    """Σ weight x z-score of each criterion."""
    return torch.stack([p.weight * zscores(scored(p.criterion, statistics)) for p in parts]).sum(0)


def union(
    parts: Sequence[Part], statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()
) -> Selection:
    """Each criterion fills its share of the places (weight / Σ weights, rounded) with its best experts in turn.

    Places that are left because criteria agree go to the experts with the highest sum of ranks.
    """
    scores = [scored(p.criterion, statistics) for p in parts]
    total = sum(p.weight for p in parts)
    quotas = [round(kept * p.weight / total) for p in parts]
    return _filled(scores, quotas, rank(parts, statistics), kept, groups, protected)


def intersection(
    parts: Sequence[Part], statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()
) -> Selection:
    """Experts that every criterion ranks high come first: the order is by each expert's worst rank.

    The first n of that order are the intersection of the criteria's own best sets, these grown until n agree. A weight
    multiplies how far a criterion ranks an expert from its best.
    """
    E = statistics.num_experts
    behind = torch.stack([p.weight * (E - 1 - ranks(scored(p.criterion, statistics))) for p in parts])
    scores = -(behind.max(0).values + behind.sum(0) / (E * len(parts) + 1))  # ties by the sum
    return _filled([scores], [kept], scores, kept, groups, protected)


def worst_domain(
    parts: Sequence[Part],
    domains: Mapping[str, LayerStatistics],
    kept: int,
    groups: int = 1,
    protected: Collection[int] = (),
) -> Selection:
    """Places go one by one to the domain whose kept experts hold the least share of its scores: its best free expert.

    Where a domain has negative scores, its scores are shifted up; each domain's are divided by their sum.
    """
    shares = _shares(parts, domains)
    places = _Places(kept, groups, shares.shape[1], protected)
    while places.left():
        held = shares[:, places.chosen].sum(1)
        for d in held.argsort(stable=True).tolist():
            if places.take(shares[d]):
                break
    return places.selection(shares.min(0).values)


def round_robin(
    parts: Sequence[Part],
    domains: Mapping[str, LayerStatistics],
    kept: int,
    groups: int = 1,
    protected: Collection[int] = (),
) -> Selection:
    """Domains take turns, each taking its best expert that is still free (arXiv:2607.01710)."""
    shares = _shares(parts, domains)
    places = _Places(kept, groups, shares.shape[1], protected)
    while places.left():
        for scores in shares:
            if places.left():
                places.take(scores)
    return places.selection(shares.max(0).values)


def _shares(parts: Sequence[Part], domains: Mapping[str, LayerStatistics]) -> Tensor:
    """[domains, E]: each domain's scores, negative ones shifted up to 0, divided by their sum; 0 for an idle expert."""
    if len(parts) != 1:
        raise InputError("worst_domain and round_robin take one criterion")
    rows = []
    for sums in domains.values():
        scores = scored(parts[0].criterion, sums)
        used = sums.count > 0
        low = torch.where(used, scores, 0.0).min()  # below zero only where a score is
        above = torch.where(used, scores - low, 0.0)
        rows.append(above / above.sum().clamp(min=1e-300))
    return torch.stack(rows)


class _Places:
    """The places of a layer, as many in each group; protected experts have theirs from the start."""

    def __init__(self, kept: int, groups: int, experts: int, protected: Collection[int]) -> None:
        self.size, self.quota = experts // groups, kept // groups
        self.kept, self.chosen = kept, sorted(protected)
        self.used = [sum(e // self.size == g for e in protected) for g in range(groups)]

    def left(self) -> int:
        return self.kept - len(self.chosen)

    def take(self, scores: Tensor) -> bool:
        """Give a place to the free expert with the highest score; the lowest number of equal ones."""
        for e in scores.argsort(descending=True, stable=True).tolist():
            if e not in self.chosen and self.used[e // self.size] < self.quota:
                self.chosen.append(e)
                self.used[e // self.size] += 1
                return True
        return False

    def selection(self, scores: Tensor) -> Selection:
        return Selection(tuple(sorted(self.chosen)), scores)


def _filled(
    scores: Sequence[Tensor],
    quotas: Sequence[int],
    rest: Tensor,
    kept: int,
    groups: int,
    protected: Collection[int],
) -> Selection:
    places = _Places(kept, groups, len(rest), protected)
    for own, quota in zip(scores, quotas, strict=True):
        best = own.argsort(descending=True, stable=True).tolist()[:quota]
        for e in best:
            if places.left() and e not in places.chosen and places.used[e // places.size] < places.quota:
                places.chosen.append(e)
                places.used[e // places.size] += 1
    while places.left():
        places.take(rest)
    return places.selection(rest)
