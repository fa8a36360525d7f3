"""Kept sets whose contributions make up those of all experts: orthogonal matching pursuit on their Gram matrix."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from moekern.criteria.needs import idle_lowest, need
from moekern.criteria.selectors import Selection
from moekern.statistics.layer import LayerStatistics

Vector = NDArray[np.float64]

TIE = 1e-9  # of the largest choice: closer ones count as equal, and less than that of all there is as nothing


def omp(statistics: LayerStatistics, kept: int, groups: int = 1, protected: Collection[int] = ()) -> Selection:
    """Experts are taken one by one, the one whose contribution is most like what those taken leave of the sum of all.

    A contribution is gate x output over all tokens, one long vector, and G their Gram matrix. The target is Σ of all
    contributions; after each step it is approximated anew, by least squares, from those that were taken, and the rest r
    of it decides the next: the largest |<p, r>| / ‖p‖ (orthogonal matching pursuit, as OMP-MoE does, arXiv:2609.31631).
    Protected experts come first, idle ones last, each group has kept / groups; where nothing is left to explain, and of
    equal experts, the louder, then the lower number. Shown are scores of what the sum loses without an expert beside
    the other dropped ones, at its own weight: G[e, e] + 2 Σ G[e, j] over dropped j ≠ e.
    """
    need(statistics, "omp", "contribution_gram")
    whole = statistics.contribution_gram
    gram = ((whole + whole.T) / 2).cpu().numpy()
    group, places = np.arange(len(gram)) // (len(gram) // groups), np.full(groups, kept // groups)
    length = np.sqrt(gram.diagonal().clip(0))
    rank = np.where((statistics.count == 0).cpu().numpy(), 2, 1)  # what comes first
    rank[list(protected)] = 0
    dropped = np.ones(len(gram), dtype=bool)
    rest, left, nothing = gram.sum(1), gram.copy(), TIE * max(float(gram.sum()), 0.0) ** 0.5
    for _ in range(kept if kept < len(gram) else 0):
        free = dropped & (places[group] > 0)
        e = _most_like(rest, length, free & (rank == rank[free].min()), nothing)
        dropped[e] = False
        places[group[e]] -= 1
        rest, left = _without(rest, left, e, gram[e, e])
    dropped &= kept < len(gram)
    beside = dropped[None, :] & ~np.eye(len(gram), dtype=bool)
    scores = torch.from_numpy(gram.diagonal() + 2 * (gram * beside).sum(1))
    return Selection(tuple(np.flatnonzero(~dropped).tolist()), idle_lowest(statistics, scores))


def _most_like(rest: Vector, length: Vector, of: NDArray[np.bool_], nothing: float) -> int:
    """The expert with the largest |<p, r>| / ‖p‖, which is at most ‖r‖; the loudest where all are nothing."""
    like = np.where(of & (length > 0), np.abs(rest) / np.where(length > 0, length, 1.0), 0.0)
    equal = of & (like >= like.max() * (1 - TIE)) if like.max() > nothing else of
    return int(np.flatnonzero(equal & (length >= length[equal].max() * (1 - TIE)))[0])


def _without(rest: Vector, left: Vector, e: int, whole: float) -> tuple[Vector, Vector]:
    """<p, r> of all experts, and the Gram matrix of what is left of them, when what e adds is taken out of both."""
    if left[e, e] <= TIE * whole:  # those before it say all that it says
        return rest, left
    along = left[e] / left[e, e]
    return rest - along * rest[e], left - np.outer(along, left[e])
