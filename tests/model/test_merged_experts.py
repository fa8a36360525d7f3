"""The arithmetic of merging against what it says, tried out."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from moekern.errors import InputError
from moekern.model.merged_experts import matched, merged_expert, shares, views_to_merge
from tests.helpers import families

CHANNELS, H = 5, 3


def expert(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "gate": (CHANNELS, H),
        "up": (CHANNELS, H),
        "down": (H, CHANNELS),
        "gate_bias": (CHANNELS,),
        "up_bias": (CHANNELS,),
        "down_bias": (H,),
    }
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def permuted(parts: dict[str, torch.Tensor], order: torch.Tensor) -> dict[str, torch.Tensor]:
    whole = ("down", "down_bias")
    return {n: v[order] if n not in whole else v[:, order] if n == "down" else v for n, v in parts.items()}


def test_of_all_permutations_the_one_that_is_most_alike() -> None:
    one, two = expert(0), expert(1)

    def likeness(order: tuple[int, ...]) -> float:
        moved = permuted(two, torch.tensor(order))
        return float(sum((one[name].double() * moved[name].double()).sum() for name in ("gate", "up", "down")))

    assert tuple(matched(one, two).tolist()) == max(permutations(range(CHANNELS)), key=likeness)


def test_a_permuted_copy_changes_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        own = expert(2, dtype)
        copy = permuted(own, torch.tensor([3, 0, 4, 2, 1]))
        merged = merged_expert(own, [(copy, 0.3)], align=True)
        for name, value in own.items():
            assert merged[name].dtype == torch.float32
            assert torch.equal(merged[name], value.float()), name
        assert not torch.equal(merged_expert(own, [(copy, 0.3)], align=False)["gate"], own["gate"].float())


def test_weights_are_shares_of_the_group() -> None:
    assert shares(3, [(1, 1.0), (3, 2.0), (5, 0.0), (6, 5.0)]) == [(1, 0.125), (6, 0.625)]
    own, others = expert(0), [expert(1), expert(2)]
    merged = merged_expert(own, zip(others, (0.125, 0.625), strict=True), align=False)
    for name, value in merged.items():
        want = 0.25 * own[name].double() + 0.125 * others[0][name].double() + 0.625 * others[1][name].double()
        torch.testing.assert_close(value.double(), want, rtol=0, atol=2**-20)


def test_layers_without_all_experts_at_hand_are_refused() -> None:
    layer = families.build("qwen3_moe").model.layers[1]
    assert len(views_to_merge(layer, "1").down) == families.EXPERTS
    with pytest.raises(InputError, match="layer 1: its experts run in groups") as found:
        views_to_merge(layer.to("meta"), "1")
    assert found.value.kind == "memory"
    with pytest.raises(InputError, match="layer 1: its experts are not held together"):
        views_to_merge(torch.nn.Linear(2, 2), "1")
