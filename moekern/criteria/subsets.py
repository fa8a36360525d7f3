"""Selectors that weigh whole kept sets: reconstruction (NAEE), clusters (STUN) and coverage (DIET)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import combinations, product

import numpy as np
import torch
from numpy.typing import NDArray

from moekern.criteria.needs import cosines, distances, idle_lowest, need
from moekern.criteria.pairs import mean_output_gram
from moekern.criteria.selectors import Selection, select
from moekern.statistics.layer import LayerStatistics

Matrix = NDArray[np.float64]

FARTHEST = 2.0  # 1 - the least cosine


def naee(statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()) -> Selection:
    """The kept set whose layer output is nearest to the whole layer's (NAEE, arXiv:2402.14800).

    Up to 10 experts every set was replayed, so the least Σ ‖all - kept‖₂² over the replayed tokens is exact (the paper
    sums norms of whole batches). Beyond, single deletions are taken to add up: ‖Σ Δ‖² by their Gram matrix, minimised
    as HOPE's objective is. Either way idle experts go first. Scores are those of `leave_one_out`, or beyond 10 experts
    what dropping the expert adds to the other dropped ones.
    """
    need(statistics, "naee", "deletion_gram")
    single = idle_lowest(statistics, statistics.deletion_gram.diagonal().clamp(min=0))
    if not statistics.subset_loss.numel():
        gram = (statistics.deletion_gram + statistics.deletion_gram.T) / 2
        return select(gram.cpu().numpy(), statistics, kept, groups, protected)
    loss = statistics.subset_loss.tolist()
    sets = _sets(statistics.num_experts, kept, groups, protected)
    idle = (statistics.count == 0).tolist()
    keep = min(sets, key=lambda keep: (sum(idle[e] for e in keep), loss[sum(1 << e for e in keep)], keep))
    return Selection(keep, single)


def _sets(E: int, kept: int, groups: int, protected: Collection[int]) -> Iterator[tuple[int, ...]]:
    size = E // groups
    parts = [combinations(range(g * size, (g + 1) * size), kept // groups) for g in range(groups)]
    for chosen in product(*parts):
        keep = sum(chosen, ())
        if set(protected) <= set(keep):
            yield keep


def leave_one_out_greedy(
    statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()
) -> Selection:
    """Experts are dropped one by one, always the one that adds least to ‖Σ Δ‖² of the dropped ones.

    Single deletions are taken to add up, so a step is exact only for the first expert.
    """
    need(statistics, "leave_one_out_greedy", "deletion_gram")
    gram = (statistics.deletion_gram + statistics.deletion_gram.T).cpu().numpy() / 2
    return select(gram, statistics, kept, groups, protected, greedy=True)


def stun(statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()) -> Selection:
    """Clusters of experts, of each of which the one nearest to its centre stays (STUN, arXiv:2409.06211).

    Distance: that of the router's rows less the share of tokens that chose both, each divided by its largest value;
    average linkage. Within a group there are as many clusters as places. Scores: -distance from the cluster's centre.
    """
    need(statistics, "stun", "router_gram")
    gram = statistics.router_gram
    far = distances(gram)
    both = statistics.coactivation.double().fill_diagonal_(0)
    far = far / far.max().clamp(min=1e-300) - both / both.max().clamp(min=1)
    distance = (far - far.min()).fill_diagonal_(0).cpu().numpy()
    return _one_of_each(distance, _to_centre(gram.cpu().numpy()), statistics, kept, groups, protected)


def hc_smoe_clusters(
    statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()
) -> Selection:
    """Average-linkage clusters of mean outputs, each of which keeps its most central expert (arXiv:2410.08589).

    HC-SMoE merges a cluster; here all its members but the one nearest the centre are dropped. Distance: Euclidean, of
    the mean outputs over the replayed tokens, as in the official code. Scores: -squared distance from the centre.
    """
    gram = mean_output_gram(statistics, "hc_smoe_clusters")
    distance, value = distances(gram).cpu().numpy(), _to_centre(gram.cpu().numpy())
    return _one_of_each(distance, value, statistics, kept, groups, protected)


def hc_smoe_clusters_cosine(
    statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()
) -> Selection:
    """As `hc_smoe_clusters` (arXiv:2410.08589), by 1 - cosine of the mean outputs; the most used of a cluster stays.

    Scores: usage.
    """
    gram = mean_output_gram(statistics, "hc_smoe_clusters_cosine")
    distance = (1 - cosines(gram)).clamp(min=0).fill_diagonal_(0)
    count = statistics.count.cpu().numpy()
    return _one_of_each(
        distance.cpu().numpy(),
        lambda members: np.asarray(count[members], dtype=np.float64),
        statistics,
        kept,
        groups,
        protected,
    )


def diet(statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()) -> Selection:
    """The kept set that covers all deletion signatures: least Σ over experts of the distance to the nearest kept one.

    A signature is Σ Δ over the replayed tokens, distance 1 - cosine: k-median by adding greedily, then swapping while
    that helps (the coverage of DIET, without its layer budgets and annealing). An expert without a signature needs no
    cover and gives none: such experts go first, idle ones before all. Scores: what dropping the expert alone would add
    to the sum.
    """
    need(statistics, "diet", "deletion_sum")
    gram = statistics.deletion_sum @ statistics.deletion_sum.T
    distance = (1 - cosines(gram)).clamp(min=0).fill_diagonal_(0).cpu().numpy()
    silent = (gram.diagonal() <= 0).cpu().numpy()
    idle = (statistics.count == 0).cpu().numpy()
    last = silent.astype(np.int64) + 2 * idle  # places go to experts at 0, then to those at 1, 2, 3
    E, heard = len(distance), last == 0
    group = np.arange(E) // (E // groups)
    chosen = sorted(protected)
    while len(chosen) < kept:
        full = np.bincount(group[chosen], minlength=groups) >= kept // groups
        free = [e for e in range(E) if e not in chosen and not full[group[e]]]
        chosen.append(min(free, key=lambda e: (last[e], _uncovered(distance[heard], [*chosen, e]), e)))
    keep = _swapped(distance[heard], chosen, group, np.flatnonzero(heard).tolist(), protected)
    near = np.where(np.eye(E, dtype=bool) | ~heard, np.inf, distance).min(1, initial=FARTHEST)
    return Selection(tuple(keep), idle_lowest(statistics, torch.from_numpy(np.where(heard, near, 0.0))))


def _uncovered(distance: Matrix, kept: list[int]) -> float:
    return float(distance[:, kept].min(1).sum())


def _swapped(
    distance: Matrix, kept: list[int], group: NDArray[np.int64], heard: list[int], protected: Collection[int]
) -> list[int]:
    """Exchange a kept and a dropped expert of one group, both among the `heard`, while that covers more of them."""
    best, value = sorted(kept), _uncovered(distance, kept)
    improved = True
    while improved:
        improved = False
        for out in [e for e in best if e not in protected and e in heard]:
            for new in [e for e in heard if e not in best and group[e] == group[out]]:
                trial = sorted([*(e for e in best if e != out), new])
                found = _uncovered(distance, trial)
                if found < value * (1 - 1e-12):
                    best, value, improved = trial, found, True
                    break
            if improved:
                break
    return best


Value = Callable[[list[int]], Matrix]  # members of a cluster -> how much each should be the one that stays


def _to_centre(gram: Matrix) -> Value:
    """-squared distance of each member from the mean of all, from inner products.

    Rounded, so that equal ones are equal: two members always are as far from their mean.
    """

    def nearness(members: list[int]) -> Matrix:
        part = gram[np.ix_(members, members)]
        scale = float(part.diagonal().max()) or 1.0
        return np.round((2 * part.mean(1) - part.diagonal() - part.mean()) / scale, 12) * scale

    return nearness


def _one_of_each(
    distance: Matrix,
    value: Value,
    statistics: LayerStatistics,
    kept: int,
    groups: int,
    protected: Collection[int],
) -> Selection:
    """Of as many clusters as there are places in each group, the member with the highest value; protected ones first.

    Idle experts stay only where no other is left. Clusters with two protected members leave fewer places for others,
    which the largest clusters get.
    """
    E, idle = len(distance), (statistics.count == 0).cpu().numpy()
    size, quota = E // groups, kept // groups
    keep: list[int] = []
    scores = np.zeros(E)
    for first in range(0, E, size):
        mine = list(range(first, first + size))
        ranked: list[tuple[tuple[bool, bool, bool, int], int]] = []
        for members in average_linkage(distance, mine, quota):
            worth = value(members)
            scores[members] = worth
            order = sorted(zip(members, worth, strict=True), key=lambda m: (m[0] not in protected, idle[m[0]], -m[1]))
            for place, (e, _) in enumerate(order):
                ranked.append(((e not in protected, bool(idle[e]), place > 0, -len(members)), e))
        keep += [e for _, e in sorted(ranked)[:quota]]
    return Selection(tuple(sorted(keep)), idle_lowest(statistics, torch.from_numpy(scores)))


def average_linkage(distance: Matrix, members: list[int], number: int) -> list[list[int]]:
    """The two clusters with the least mean distance are joined until `number` are left; of equal pairs the first."""
    clusters = [[e] for e in members]
    far = np.triu(distance[np.ix_(members, members)], 1)
    far += far.T
    np.fill_diagonal(far, np.inf)
    for _ in range(len(members) - number):
        i, j = divmod(int(far.argmin()), len(members))
        one, other = len(clusters[i]), len(clusters[j])
        far[i] = far[:, i] = (one * far[i] + other * far[j]) / (one + other)
        far[j] = far[:, j] = np.inf
        clusters[i], clusters[j] = sorted(clusters[i] + clusters[j]), []
    return [cluster for cluster in clusters if cluster]
