"""HOPE: choose the dropped set as a whole, from how strongly experts act on the same tokens (arXiv:2609.18916).

With a = g ‖y‖ and F[i, j] = mean of aᵢ aⱼ over the tokens routed to both (0 when there are none), the dropped set P
minimises pᵀ F p, p its indicator. The diagonal alone is a REAP-like ranking, S(1, 2, 2). F is symmetric and entrywise
non-negative but need not be positive semi-definite. Float64; nothing here depends on chance.
"""

from collections.abc import Collection, Iterable
from itertools import combinations, product
from math import comb, prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekern.criteria.needs import idle_lowest
from moekern.statistics.layer import LayerStatistics

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]

EXACT = comb(16, 8)  # subsets that are tried one by one: every case of up to 16 experts
STEPS = 20  # of the relaxation in each group, at most, for each member; it takes one or two
PATIENCE, REST = 200, 8  # of the search for sets that no single exchange leads to
LEAST = 1e-15  # of a step's gain, as a share of trace(F)
TIE = 1e-12  # objectives closer than this share of trace(F) count as equal


class Selection(NamedTuple):
    """What a selector returns."""

    keep: tuple[int, ...]  # expert numbers, rising
    scores: Tensor  # [E] float64, for display; higher is costlier to drop


def hope(statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()) -> Selection:
    """Keep `kept` experts, kept / groups in each of `groups` equal blocks, protected ones among them.

    Idle experts are dropped first. Up to 12870 candidate sets are enumerated; beyond, the relaxation of p to the
    capped simplex is descended and rounded, another set is dropped one by one, and both are improved by swaps. From the
    best of them and of two rankings the search goes on past sets that are no better, until 200 exchanges in a row have
    found none that is.
    The displayed score of an expert is the objective that dropping it adds to the rest of the dropped set:
    F[e, e] + 2 Σ F[e, j] over dropped j ≠ e. With kept = E that is the diagonal, the cost of dropping e alone.
    """
    return select(conditional_pairs(statistics), statistics, kept, groups, protected)


def hope_all_tokens(
    statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()
) -> Selection:
    """As `hope`, with F the mean of aᵢ aⱼ over all tokens: the bound that the paper derives, not the form it runs.

    pᵀ F p is then E[(Σ of the dropped a)²], so rarely used experts weigh little, as in the sums of gated norms.
    """
    pairs = ((statistics.pair_sum + statistics.pair_sum.T) / 2 / statistics.tokens.clamp(min=1)).cpu().numpy()
    return select(pairs, statistics, kept, groups, protected)


def select(
    F: Matrix,
    statistics: LayerStatistics,
    kept: int,
    groups: int,
    protected: Collection[int],
    *,
    greedy: bool = False,
) -> Selection:
    """The dropped set with the least pᵀ F p found, idle experts first; `greedy` adds one expert at a time to it."""
    E = len(F)
    group = np.arange(E) // (E // groups)
    dropped, free, quota = _certain(statistics, E // groups - kept // groups, groups, protected)
    index = np.flatnonzero(free)
    if len(index) and quota.sum():
        part = F[np.ix_(index, index)]
        if greedy:
            dropped[index] = _greedy(part, group[index], quota)
        else:
            reap = (statistics.gated_norm_sum / statistics.count.clamp(min=1)).cpu().numpy()
            dropped[index] = best_set(part, group[index], quota, [reap[index]])
    others = dropped[None, :] & ~np.eye(E, dtype=bool)
    scores = torch.from_numpy(F.diagonal() + 2 * (F * others).sum(1))
    return Selection(tuple(np.flatnonzero(~dropped).tolist()), idle_lowest(statistics, scores))


def conditional_pairs(statistics: LayerStatistics) -> Matrix:
    """F [E, E] float64: pair_sum / coactivation, 0 where the two never met; symmetric."""
    pairs = statistics.pair_sum / statistics.coactivation.clamp(min=1)
    pairs = torch.where(statistics.coactivation > 0, pairs, 0.0)
    return ((pairs + pairs.T) / 2).cpu().numpy()


def best_set(F: Matrix, group: NDArray[np.int64], quota: NDArray[np.int64], rankings: Iterable[Vector] = ()) -> Mask:
    """The set P with quota[g] members in group g and the least pᵀ F p found, as a mask [n].

    Exact for up to 12870 candidates; ties drop the highest numbers. `rankings` [n]: what they keep is tried too.
    """
    if prod(comb(int((group == g).sum()), int(q)) for g, q in enumerate(quota)) <= EXACT:
        return _enumerate(F, group, quota)
    near = _round(relax(F, group, quota), group, quota), _greedy(F, group, quota)
    ranked = (_round(-np.asarray(r), group, quota) for r in (F.diagonal(), *rankings))
    sets = [*(_swap(F, group, p) for p in near), *ranked]
    values = np.array([objective(F, p) for p in sets])
    return _swap(F, group, sets[int(np.flatnonzero(values <= values.min() + TIE * np.trace(F))[0])], PATIENCE)


def objective(F: Matrix, dropped: Mask) -> float:
    """pᵀ F p."""
    return float(F[np.ix_(dropped, dropped)].sum())


def relax(F: Matrix, group: NDArray[np.int64], quota: NDArray[np.int64]) -> Vector:
    """A stationary p [n] of pᵀ F p over 0 <= p <= 1 with quota[g] in each group g, by pairwise Frank-Wolfe steps
    (arXiv:1511.05932) from the centre.

    A step moves weight within a group, from the member with the steepest slope to that which this lowers the objective
    most by, and as much as lowers it most: to a bound where the curve between the two is not convex. It costs O(n).
    Equal ones: from the lowest number, to the highest.
    """
    form = F / (float(np.trace(F)) or 1.0)
    members = [np.flatnonzero(group == g)[::-1] for g in range(len(quota))]
    p = (quota / np.array([max(len(m), 1) for m in members]))[group]
    slope = form @ p
    for _ in range(STEPS * len(F)):
        if not any([_shift(form, p, slope, m) for m in members if len(m) > 1]):
            break
    return p


def _shift(form: Matrix, p: Vector, slope: Vector, members: NDArray[np.int64]) -> bool:
    """One step between two of the members: `p`, and `slope` = form @ p, are changed. False where none lowers pᵀ F p."""
    above = p[members] > 0
    source = int(members[::-1][np.where(above, slope[members], -np.inf)[::-1].argmax()])
    gap = slope[source] - slope[members]
    curve = form[source, source] + form.diagonal()[members] - 2 * form[source, members]
    step = np.minimum(p[source], 1 - p[members])
    step = np.where(gap.clip(0) < curve * step, gap.clip(0) / np.where(curve > 0, curve, 1.0), step)
    gain = step * (2 * gap - curve * step)
    best = int(gain.argmax())
    if not gain[best] > LEAST:
        return False
    target, moved = int(members[best]), float(step[best])
    p[target] = min(p[target] + moved, 1.0)
    p[source] = max(p[source] - moved, 0.0)
    slope += moved * (form[target] - form[source])
    return True


def _certain(
    statistics: LayerStatistics, quota: int, groups: int, protected: Collection[int]
) -> tuple[Mask, Mask, NDArray[np.int64]]:
    """Experts dropped because they are idle, experts still to choose from, and how many to drop in each group."""
    idle = (statistics.count == 0).cpu().numpy()
    idle[list(protected)] = False
    E = len(idle)
    dropped = np.zeros(E, dtype=bool)
    free = ~idle
    free[list(protected)] = False
    left = np.full(groups, quota)
    size = E // groups
    for g in range(groups):
        first = np.flatnonzero(idle[g * size : (g + 1) * size])[::-1][:quota] + g * size
        dropped[first] = True
        left[g] -= len(first)
        if left[g] == 0:
            free[g * size : (g + 1) * size] = False
    return dropped, free, left


def _enumerate(F: Matrix, group: NDArray[np.int64], quota: NDArray[np.int64]) -> Mask:
    """Try every set; sets of the highest numbers come first, so that they win ties."""
    choices = (combinations(np.flatnonzero(group == g)[::-1].tolist(), int(q)) for g, q in enumerate(quota))
    sets = np.array([sum(parts, ()) for parts in product(*choices)], dtype=np.int64)
    p = np.zeros((len(sets), len(F)))
    np.put_along_axis(p, sets, 1.0, axis=1)
    values = np.einsum("si,si->s", p @ F, p)
    return p[int(np.flatnonzero(values <= values.min() + TIE * np.trace(F))[0])] > 0


def _round(wish: Vector, group: NDArray[np.int64], quota: NDArray[np.int64]) -> Mask:
    """The quota[g] largest wishes of each group; ties to the highest number."""
    dropped = np.zeros(len(wish), dtype=bool)
    for g, q in enumerate(quota):
        ranked = sorted(np.flatnonzero(group == g).tolist(), key=lambda e: (-wish[e], -e))
        dropped[ranked[: int(q)]] = True
    return dropped


def _greedy(F: Matrix, group: NDArray[np.int64], quota: NDArray[np.int64]) -> Mask:
    """Drop one expert at a time, the one that adds least; ties to the highest number."""
    dropped = np.zeros(len(F), dtype=bool)
    left = quota.copy()
    cost = F.diagonal().copy()
    while left.sum():
        open_ = np.where(dropped | (left[group] == 0), np.inf, cost)
        e = len(F) - 1 - int(open_[::-1].argmin())
        dropped[e] = True
        left[group[e]] -= 1
        cost += 2 * F[e]
    return dropped


def _swap(F: Matrix, group: NDArray[np.int64], dropped: Mask, patience: int = 0) -> Mask:
    """Exchange a dropped and a kept expert of one group, the best pair each time, while that lowers the objective.

    With patience, so many exchanges in a row may pass over sets that are no better (tabu search): the best pair all the
    same, without experts that were exchanged in the last REST steps unless that gives the best set so far.
    """
    dropped, best, twice = dropped.copy(), dropped.copy(), 2 * F
    diagonal, tie, load = F.diagonal(), TIE * np.trace(F), twice @ dropped
    apart = group[dropped][:, None] != group[~dropped][None, :]  # of any sets: as many of each group are in them
    grouped = bool(apart.any())
    rests = np.zeros(len(F), dtype=np.int64)  # until which step
    above, idle, step = 0.0, 0, 0  # the objective less the best one; steps since that
    while not apart.all():
        out, kept = np.flatnonzero(dropped), np.flatnonzero(~dropped)
        change = twice.take(out, 0).take(kept, 1)
        np.subtract((diagonal + load)[None, kept], change, out=change)
        change -= (load - diagonal)[out, None]
        if grouped:
            change[apart] = np.inf
        i, j = divmod(int(change.argmin()), len(kept))
        if idle and not above + change[i, j] < -tie:
            change[rests[out] > step] = np.inf
            change[:, rests[kept] > step] = np.inf
            i, j = divmod(int(change.argmin()), len(kept))
        above, idle, step = above + change[i, j], idle + 1, step + 1
        if above < -tie:
            above, idle = 0.0, 0
        elif idle > patience or not np.isfinite(above):
            break
        dropped[out[i]], dropped[kept[j]] = False, True
        rests[[out[i], kept[j]]] = step + REST
        load += twice[kept[j]] - twice[out[i]]
        if not idle:
            best = dropped.copy()
    return best
