"""The router's numbers: one value, the same whoever gives it."""

from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from moekern.architectures.table import FAMILIES
from moekern.router import Router, count_problem, kept_count

DEEPSEEK = Router(64, 6, n_group=8, topk_group=3, group_top=2)


def test_routers_are_values() -> None:
    assert Router(8, 2) == Router(num_experts=8, top_k=2, n_group=1, topk_group=1, group_top=1)
    assert len({Router(8, 2), Router(8, 2, 1, 1), DEEPSEEK, replace(DEEPSEEK)}) == 2
    assert asdict(DEEPSEEK) == {"num_experts": 64, "top_k": 6, "n_group": 8, "topk_group": 3, "group_top": 2}
    with pytest.raises(FrozenInstanceError):
        DEEPSEEK.top_k = 7  # type: ignore[misc]


@pytest.mark.parametrize("group_top", sorted({family.group_top for family in FAMILIES}))
def test_families_without_groups_rank_a_group_by_one(group_top: int) -> None:
    router = Router(8, 2, group_top=group_top)
    assert router.group_top == max(1, group_top)
    assert router == Router(8, 2, 1, 1, router.group_top)
    assert router.of(4).group_top == router.group_top


def test_a_layer_of_another_size_has_the_same_router() -> None:
    small = DEEPSEEK.of(24)
    assert small == Router(24, 6, 8, 3, 2)
    assert small.of(64) == DEEPSEEK
    assert DEEPSEEK.num_experts == 64
    assert kept_count(0.5, DEEPSEEK) == 32
    assert count_problem(32, DEEPSEEK) is None
    assert count_problem(32, small) == "more than the 24 experts there are"
