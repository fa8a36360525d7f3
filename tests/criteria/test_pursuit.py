"""omp against orthogonal matching pursuit on the contributions themselves, and against all sets."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moekern.criteria import CRITERIA
from moekern.statistics.layer import LayerStatistics
from tests.helpers.tokens import measured, tokens

omp = CRITERIA["omp"].function
Atoms = NDArray[np.float64]


def atoms_of(seed: int, E: int = 9, size: int = 40) -> Atoms:
    """[E, size] contributions that share directions, some louder than others."""
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(E, size)) + draw.normal(size=(E, 3)) @ draw.normal(size=(3, size))) * np.linspace(
        0.5, 2, E
    )[:, None]


def sums_of(atoms: Atoms) -> LayerStatistics:
    s = LayerStatistics.zeros(len(atoms), tiers=("gram",))
    return replace(s, count=torch.ones_like(s.count), contribution_gram=torch.from_numpy(atoms @ atoms.T))


def unexplained(atoms: Atoms, keep: tuple[int, ...] | list[int]) -> float:
    target = atoms.sum(0)
    factors = np.linalg.lstsq(atoms[list(keep)].T, target, rcond=None)[0]
    return float(np.linalg.norm(target - factors @ atoms[list(keep)]))


def literal(atoms: Atoms, kept: int, free: list[int], taken: list[int]) -> list[int]:
    for _ in range(kept - len(taken)):
        chosen = atoms[taken]
        rest = atoms.sum(0)
        if taken:
            rest = rest - np.linalg.lstsq(chosen.T, rest, rcond=None)[0] @ chosen
        unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
        taken = [*taken, max((e for e in free if e not in taken), key=lambda e: abs(unit[e] @ rest))]  # noqa: B023
    return sorted(taken)


@pytest.mark.parametrize("seed", range(6))
def test_the_pursuit_on_the_gram_matrix_is_that_on_the_vectors(seed: int) -> None:
    atoms = atoms_of(seed)
    for kept in range(1, 9):
        assert list(omp(sums_of(atoms), kept).keep) == literal(atoms, kept, list(range(9)), []), kept
    assert list(omp(sums_of(atoms), 4, 1, (2, 7)).keep) == literal(atoms, 4, list(range(9)), [2, 7])


def test_a_sum_of_few_is_found_and_the_best_set_is_near() -> None:
    """Three experts that say all, and six that say nothing new of the sum: the best of all sets is found."""
    draw = np.random.default_rng(1)
    quiet = draw.normal(size=(6, 30))
    quiet[:, :3] = 0
    loud = np.eye(3, 30) * 5
    atoms = np.concatenate([loud, quiet - quiet.mean(0)])
    best = min(combinations(range(9), 3), key=lambda keep: unexplained(atoms, keep))
    assert omp(sums_of(atoms), 3).keep == best == (0, 1, 2)
    for seed in range(4):
        atoms = atoms_of(seed)
        least = min(unexplained(atoms, keep) for keep in combinations(range(9), 4))
        found = unexplained(atoms, omp(sums_of(atoms), 4).keep)
        assert least <= found < unexplained(atoms, list(range(4)))


def test_groups_idle_ones_and_what_says_nothing_new() -> None:
    atoms = atoms_of(0)
    atoms[4] = 2 * atoms[1]
    s = sums_of(atoms)
    keep = omp(s, 3, 3).keep
    assert [e // 3 for e in keep] == [0, 1, 2]
    s.count[[8, 0]] = 0
    assert not {0, 8} & set(omp(s, 7).keep)
    assert set(omp(s, 8).keep) == {0, 1, 2, 3, 4, 5, 6, 7} or set(omp(s, 8).keep) == {1, 2, 3, 4, 5, 6, 7, 8}
    silent = replace(s, contribution_gram=torch.zeros_like(s.contribution_gram))
    assert omp(silent, 3).keep == (1, 2, 3)  # nothing to tell them apart by


def test_scores_are_what_the_sum_loses_beside_the_dropped() -> None:
    raw = tokens(3)
    keep, scores = omp(measured(raw), 3)
    whole = torch.stack([raw.gates(t)[:, None] * raw.y[t] for t in range(len(raw.logits))], 1).flatten(1)
    dropped = [e for e in range(6) if e not in keep]

    def lost(experts: list[int]) -> float:
        return float(whole[experts].sum(0).square().sum())

    e = dropped[0]
    assert scores[e].item() == pytest.approx(lost(dropped) - lost(dropped[1:]))
    assert scores[keep[0]].item() == pytest.approx(lost([*dropped, keep[0]]) - lost(dropped))
