"""Counts are exact whatever the logits, steps stay on the surface of the expected count, and find what is best."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moekern.masks.logits import Logits, Pools, drawn, gathered, moved, spread

COUNTS = {"1": (8, 4), "4": (8, 6), "10": (12, 4)}
VALUES = st.lists(st.integers(-3, 3), min_size=28, max_size=28)  # with ties


@given(values=VALUES)
def test_each_layer_and_each_group_keeps_its_count(values: list[int]) -> None:
    mask = Pools.uniform(COUNTS, groups=2).chosen(torch.tensor(values).float())
    for key, keep in spread(mask, COUNTS).items():
        experts, count = COUNTS[key]
        assert [sum(e // (experts // 2) == group for e in keep) for group in range(2)] == [count // 2] * 2


@given(values=VALUES)
def test_a_total_is_kept_with_the_least_of_every_layer(values: list[int]) -> None:
    found = spread(Pools.total(COUNTS, 2).chosen(torch.tensor(values).float()), COUNTS)
    assert sum(map(len, found.values())) == 14
    assert min(map(len, found.values())) >= 2


def test_of_equal_values_the_lowest_numbers_stay() -> None:
    found = spread(Pools.uniform(COUNTS, 1).chosen(torch.zeros(28)), COUNTS)
    assert found == {"1": (0, 1, 2, 3), "4": (0, 1, 2, 3, 4, 5), "10": (0, 1, 2, 3)}


def test_a_beginning_is_the_plan_on_the_surface() -> None:
    kept = torch.zeros(28, dtype=torch.bool)
    kept[[0, 2, 5, 7, 9, 10, 11, 13, 14, 15, 16, 20, 24, 27]] = True
    scores = torch.arange(28.0) % 5
    for pools in (Pools.uniform(COUNTS, 1), Pools.total(COUNTS, 2)):
        logits = pools.begun(scores.double(), kept)
        assert torch.equal(pools.chosen(logits), kept)
        for pool in pools.pools:
            torch.testing.assert_close(torch.sigmoid(logits[pool.places].double()).sum().item(), float(pool.kept))


@given(seed=st.integers(0, 1000))
def test_a_step_stays_on_the_surface_and_the_moment_in_its_tangent(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values, step, moment = torch.randn(3, 16, generator=g, dtype=torch.float64)
    n = float(torch.sigmoid(values).sum())
    there, carried = moved(values, step, moment, n)  # type: ignore[arg-type]
    p = torch.sigmoid(there)
    assert abs(float(p.sum()) - n) < 1e-9
    assert abs(float((p * (1 - p)) @ carried)) < 1e-9


def test_a_pool_that_keeps_all_is_left_alone() -> None:
    logits = Logits.of(pools := Pools.uniform({"0": (4, 4)}, 1), torch.zeros(4))
    logits.stepped(torch.ones(4, dtype=torch.float64), 0.1)
    assert torch.equal(logits.values, torch.zeros(4))
    assert not pools.slope(torch.zeros(4), 1.0).any()


def test_steps_find_the_experts_of_most_worth_from_the_worst_beginning() -> None:
    counts = {"0": (12, 4), "1": (12, 4)}
    pools, worth = Pools.uniform(counts, 1), torch.randperm(24, generator=torch.Generator().manual_seed(0)).double()
    best, worst = pools.chosen(worth), pools.chosen(-worth)
    assert worth[worst].sum() < 0.5 * worth[best].sum()
    logits = Logits.of(pools, pools.begun(-worth, worst))
    for step in range(100):
        noisy = [logits.values.double() + noise for noise in drawn(24, 4, 0, step)]
        gradient = sum((-worth * pools.slope(values, 0.05 ** (step / 99)) for values in noisy), torch.zeros(24))
        logits.stepped(gradient, 0.1)
    assert worth[pools.chosen(logits.values)].sum() >= 0.95 * worth[best].sum()


def test_noise_comes_in_antithetic_pairs_and_is_new_in_every_step() -> None:
    first, second, third = drawn(5, 3, seed=1, step=0)
    assert torch.equal(first, -second)
    assert not torch.equal(first, third)
    assert torch.equal(drawn(5, 1, seed=1, step=0)[0], first)
    assert not torch.equal(drawn(5, 1, seed=1, step=1)[0], first)


def test_layers_lie_one_after_another() -> None:
    vector = gathered({key: torch.full((experts,), float(key)) for key, (experts, _) in COUNTS.items()}, COUNTS)
    assert vector.tolist() == [1.0] * 8 + [4.0] * 8 + [10.0] * 12
