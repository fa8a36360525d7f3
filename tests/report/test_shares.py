"""Numbers of one layer against what they are by definition."""

from __future__ import annotations

from math import log

import pytest
import torch

from moekern.report.shares import (
    POINTS,
    absorbed,
    knee,
    largest,
    lift,
    on_grid,
    order,
    outlying,
    removed,
    saliency,
    share_of,
    spike,
    spiking,
    strongest,
    uneven,
)

TOGETHER = torch.tensor([[50, 10, 4, 0], [10, 30, 0, 6], [4, 0, 10, 0], [0, 6, 0, 0]])  # expert 3: an odd diagonal


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_saliency_of_scores_with_and_without_negative_ones() -> None:
    mass, below = saliency(doubles(4, 1, -9, 2), torch.tensor([5, 5, 0, 5]))
    assert (mass / mass.max()).tolist() == [1, 0.25, 0, 0.5]  # the idle one has none, whatever its score
    assert not below
    mass, below = saliency(doubles(-1, -3, 1), torch.tensor([5, 5, 5]))
    assert (mass / mass.max()).tolist() == pytest.approx([0.5, 0, 1])
    assert below
    huge, _ = saliency(doubles(1.7e308, -1.7e308), torch.tensor([1, 1]))
    assert share_of(huge, [0]) == 1


def test_the_order_and_what_is_removed_in_it() -> None:
    assert order([2, 1, 2, 0]) == [3, 1, 2, 0]  # of equal ones the lowest number stays longest
    assert removed([3, 1, 2, 0], doubles(4, 1, 3, 2)) == pytest.approx([0, 0.2, 0.3, 0.6, 1])
    assert removed([0, 1], doubles(0, 0)) == [0, 0, 0]


def test_the_grid_joins_counts_by_straight_lines() -> None:
    found = on_grid([0, 0.2, 1])  # of two experts
    assert len(found) == POINTS
    assert found[0] == 0
    assert found[POINTS // 2] == pytest.approx(0.2)
    assert found[POINTS // 4] == pytest.approx(0.1)
    assert found[-1] == 1


def test_the_knee_is_farthest_below_the_diagonal() -> None:
    assert knee([0, 0.1, 0.2, 0.6, 1]) == 2  # 0.15, 0.3 and 0.15 below
    assert knee([0, 0.25, 0.5, 0.75, 1]) is None
    assert knee([0, 0.5, 0.6, 0.8, 1]) is None


def test_how_uneven_load_is() -> None:
    count = torch.tensor([1, 5, 2, 0])
    pairs = [abs(a - b) for a in count.tolist() for b in count.tolist()]
    assert uneven(count) == pytest.approx((2.5, sum(pairs) / (2 * 16 * 2), (14 / 4) ** 0.5 / 2))
    assert uneven(torch.tensor([3, 3])) == pytest.approx((1, 0, 0))
    assert uneven(torch.zeros(3)) == (None, None, None)


def test_absorption_counts_slots_beside_those_of_dropped_experts() -> None:
    # experts 1 and 2 go: beside 1 stand 10 slots of 0 and 6 of 3, beside 2 4 of 0
    assert absorbed(TOGETHER, [0, 3]) == pytest.approx(1)
    # experts 0 and 1 go: 10 + 4 and 10 + 6 slots, of which 4 and 6 stay
    assert absorbed(TOGETHER, [2, 3]) == pytest.approx(10 / 30)
    assert absorbed(TOGETHER, [0, 1, 2, 3]) is None
    assert TOGETHER[0, 0] == 50


def test_tail_risk_is_beyond_the_quantile_of_all_layers() -> None:
    quiet, loud = doubles(1, 2, 3), doubles(4, 9)
    limit = spike([quiet, loud])  # the 75th percentile of both together
    assert limit == 4
    assert spiking(loud, [1, 0], limit) == 0.5
    assert spiking(quiet, [0, 2], limit) == 0
    assert spiking(loud, [], limit) is None


def test_lift_is_joint_over_product() -> None:
    found = lift(TOGETHER, 100)
    assert found[0, 1] == pytest.approx((10 / 100) / (0.5 * 0.3))
    assert found[1, 2] == 0
    assert found[0, 0].isnan()
    assert found[1, 3].isnan()  # of an expert that is never counted nothing is known


def test_the_strongest_pairs_come_by_what_chance_would_not_give() -> None:
    together = torch.tensor([[100, 40, 2], [40, 100, 20], [2, 20, 20]])
    found = strongest(together, 400, 9)
    worth = {(i, j): n * log(x) for i, j, n, x in found}
    assert set(worth) == {(0, 1), (1, 2)}  # 0 and 2 are together less than by chance
    assert list(worth.values()) == sorted(worth.values(), reverse=True)
    assert strongest(together, 400, 1) == found[:1]


def test_the_largest_come_in_order_and_of_equal_ones_the_first() -> None:
    assert largest(doubles(1, 3, 2, 3, 2, 2), 4) == [1, 3, 2, 4]
    assert largest(doubles(1, 1), 5) == [0, 1]


def test_the_farthest_expert_in_standard_deviations() -> None:
    values, used = doubles(1, 1, 1, 5, 99), torch.tensor([True, True, True, True, False])
    found = outlying(values, used)
    assert found is not None
    assert found[0] == 3
    assert found[1] == pytest.approx(3 / 3**0.5)  # mean 2, variance 3
    assert outlying(doubles(2, 2, 2), torch.ones(3, dtype=torch.bool)) is None
    assert outlying(values, torch.tensor([True, True, False, False, False])) is None
