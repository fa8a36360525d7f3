"""Kept sets whose contributions make up those of all experts: orthogonal matching pursuit on their Gram matrix."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from moekern.criteria.needs import idle_lowest, need
from moekern.criteria.selectors import Selection
from moekern.statistics.layer import LayerStatistics

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
    E, size, places = len(gram), len(gram) // groups, np.full(groups, kept // groups)
    idle = (statistics.count == 0).cpu().numpy()
    taken: list[int] = []
    rest, left, target = gram.sum(1), gram.copy(), float(gram.sum())
    while len(taken) < kept:
        free = [e for e in range(E) if e not in taken and places[e // size]]
        first = [e for e in free if e in protected] or [e for e in free if not idle[e]] or free
        e = first[0] if first[0] in protected else _most_like(gram, rest, first, target)
        taken.append(e)
        places[e // size] -= 1
        rest, left = _without(rest, left, e, gram[e, e])
    dropped = np.ones(E, dtype=bool)
    dropped[taken] = False
    beside = dropped[None, :] & ~np.eye(E, dtype=bool)
    scores = torch.from_numpy(gram.diagonal() + 2 * (gram * beside).sum(1))
    return Selection(tuple(sorted(taken)), idle_lowest(statistics, scores))


def _most_like(gram: NDArray[np.float64], rest: NDArray[np.float64], of: list[int], target: float) -> int:
    """The expert with the largest |<p, r>| / ‖p‖, which is at most ‖r‖; `target` is ‖r‖² of the whole."""
    length = np.sqrt(gram.diagonal()[of].clip(0))
    like = np.where(length > 0, np.abs(rest[of]) / np.where(length > 0, length, 1.0), 0.0)
    best = like.max()
    equal = like >= best * (1 - TIE) if best > TIE * max(target, 0.0) ** 0.5 else np.full(len(of), True)
    loudest = length[equal].max()
    return next(e for e, same, long in zip(of, equal, length, strict=True) if same and long >= loudest * (1 - TIE))


def _without(
    rest: NDArray[np.float64], left: NDArray[np.float64], e: int, whole: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """<p, r> of all experts, and the Gram matrix of what is left of them, when what e adds is taken out of both."""
    if left[e, e] <= TIE * whole:  # those before it say all that it says
        return rest, left
    along = left[e] / left[e, e]
    return rest - along * rest[e], left - np.outer(along, left[e])
