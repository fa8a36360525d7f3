"""Criteria made of criteria: sums of ranks or z-scores, the other end, sets united or intersected, domains in turn.

Experts are compared with those that tokens were routed to. Idle ones are put aside first and then stand lowest: the
mark at which a criterion leaves them would say too much beside its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekern.criteria.needs import lowest_but
from moekern.criteria.selectors import Selection
from moekern.criteria.table import OTHER_ENDS, Criterion
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
    """(score - mean) / standard deviation over the experts; 0 where all are equal.

    One that stands far out takes spread from the others, as it does not from ranks.
    """
    apart = scores.max() > scores.min()  # the spread of equal scores may be the rounding of their mean
    return torch.where(apart, (scores - scores.mean()) / scores.std(correction=0), 0.0)


def rank(parts: Sequence[Part], statistics: LayerStatistics) -> Tensor:
    """Σ weight x rank of each criterion, idle experts lowest."""
    return _summed(parts, statistics, ranks)


def zscore(parts: Sequence[Part], statistics: LayerStatistics) -> Tensor:
    """Σ weight x z-score of each criterion, idle experts lowest."""
    return _summed(parts, statistics, zscores)


def inverse(parts: Sequence[Part], statistics: LayerStatistics) -> Tensor:
    """The other end of a criterion: what it keeps first goes first, after idle experts.

    MC-Suite (arXiv:2504.05586) drops both the highest and the lowest of each of its 16 criteria. The negated score,
    and where a criterion parts pairs, the same rule for the pair at the other end.
    """
    (part,) = parts
    other = OTHER_ENDS.get(part.criterion.name)
    scores = -scored(part.criterion, statistics) if other is None else other(statistics)
    return lowest_but(_compared(parts, statistics), part.weight * scores)


def _compared(parts: Sequence[Part], statistics: LayerStatistics) -> Tensor:
    """[E] bool: all experts but the idle ones.

    To criteria that look at weights alone these are none, but for statistics without tokens that count some experts
    nevertheless: a plan marks so which others go first.
    """
    used = statistics.count > 0
    if all(part.criterion.family == "weight" for part in parts) and (statistics.tokens.any() or not used.any()):
        return torch.ones_like(used)
    return used


def _summed(parts: Sequence[Part], statistics: LayerStatistics, scale: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ weight x `scale` of each criterion's scores of the experts that are compared; the others lowest."""
    used = _compared(parts, statistics)
    total = torch.zeros(statistics.num_experts, dtype=torch.float64, device=used.device)
    if used.any():
        for part in parts:
            total[used] += part.weight * scale(scored(part.criterion, statistics)[used])
    return lowest_but(used, total)


def union(
    parts: Sequence[Part], statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()
) -> Selection:
    """Each criterion fills its share of the places (weight / Σ weights, rounded) with its best experts in turn.

    Places that are left because criteria agree go to the experts with the highest sum of ranks. Idle experts get
    places that no other can take.
    """
    used = _compared(parts, statistics)
    scores = [lowest_but(used, scored(p.criterion, statistics)) for p in parts]
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
    E, used = statistics.num_experts, _compared(parts, statistics)
    marked = [lowest_but(used, scored(p.criterion, statistics)) for p in parts]
    behind = torch.stack([p.weight * (E - 1 - ranks(scores)) for p, scores in zip(parts, marked, strict=True)])
    scores = ranks(-behind.max(0).values) + ranks(-behind.sum(0)) / (2 * E)  # ties by the sum, less than half a rank
    return _filled([], [], lowest_but(used, scores), kept, groups, protected)


def worst_domain(
    parts: Sequence[Part],
    domains: Mapping[str, LayerStatistics],
    kept: int,
    groups: int = 1,
    protected: Collection[int] = (),
) -> Selection:
    """Places go one by one to the domain whose kept experts hold the least share of its scores: its best free expert.

    Where a domain has negative scores, its scores are shifted up until the lowest is 0, and never down; each domain's
    are divided by their sum. Experts idle in a domain are its last choice, those idle in all the last of all.
    """
    shares, order = _shares(parts, domains)
    places = _Places(kept, groups, shares.shape[1], protected)
    while places.left():
        held = shares[:, places.chosen].sum(1)
        for d in held.argsort(stable=True).tolist():
            if places.take(order[d]):
                break
    return places.selection(lowest_but(_used_somewhere(parts, domains), shares.min(0).values))


def round_robin(
    parts: Sequence[Part],
    domains: Mapping[str, LayerStatistics],
    kept: int,
    groups: int = 1,
    protected: Collection[int] = (),
) -> Selection:
    """Domains take turns, each taking its best expert that is still free (arXiv:2607.01710).

    Their order is that in which they are given; a plan gives them by their names.
    Experts idle in a domain are its last choice, those idle in all the last of all.
    """
    shares, order = _shares(parts, domains)
    places = _Places(kept, groups, shares.shape[1], protected)
    while places.left():
        for scores in order:
            if places.left():
                places.take(scores)
    return places.selection(lowest_but(_used_somewhere(parts, domains), shares.max(0).values))


def _shares(parts: Sequence[Part], domains: Mapping[str, LayerStatistics]) -> tuple[Tensor, Tensor]:
    """Twice [domains, E]: shares, and the order in which a domain takes experts (the highest first).

    A share is a score divided by the sum of the domain's, after the lowest negative one was shifted up to 0; 0 for an
    idle expert. Where that leaves nothing above 0 all used experts have the same share, and where none is used, all
    have. In the order one idle in the domain stands at -1, one idle in all at -2.
    """
    rows, orders = [], []
    everywhere = _used_somewhere(parts, domains)
    for sums in domains.values():
        scores, used = scored(parts[0].criterion, sums), _compared(parts, sums)
        low = torch.where(used, scores, 0.0).min().clamp(max=0)
        above = torch.where(used, scores - low, 0.0)
        if not above.any():
            above = (used if used.any() else ~used).double()
        rows.append(above / above.sum().clamp(min=1e-300))
        orders.append(torch.where(used, rows[-1], torch.where(everywhere, -1.0, -2.0)))
    return torch.stack(rows), torch.stack(orders)


def _used_somewhere(parts: Sequence[Part], domains: Mapping[str, LayerStatistics]) -> Tensor:
    """[E] bool: experts that are compared in some domain."""
    return torch.stack([_compared(parts, sums) for sums in domains.values()]).any(0)


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
