"""Segments fold in one order, and nothing but their numbers decides the bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern.statistics.folding import Folding
from moekern.statistics.layer import HALVED
from tests.helpers.measured import assert_same, layer_statistics, with_tiers


@settings(deadline=None, max_examples=15)
@given(st.sets(st.integers(0, 40), min_size=1, max_size=7))
def test_even_and_odd_segments_add_up_in_order(numbers: set[int]) -> None:
    parts = {n: with_tiers(layer_statistics(n), n) for n in {0, *numbers}}
    halves = [[parts[n] for n in sorted(parts) if n % 2 == parity] for parity in (0, 1)]
    sums = [sum(half[1:], half[0]) for half in halves if half]
    want = sum(sums[1:], sums[0])
    apart = sums if len(sums) == 2 else [sums[0], sums[0].like()]
    want = replace(want, **{f"half_{n}": torch.stack([getattr(half, n) for half in apart]) for n in HALVED})
    fold = Folding()
    for n in sorted(parts):
        fold.add(n, with_tiers(layer_statistics(n), n))
    assert_same(fold.total(), want)


def test_a_segment_out_of_order_is_an_error() -> None:
    fold = Folding()
    fold.add(2, layer_statistics(2))
    for late in (1, 2):
        with pytest.raises(RuntimeError, match=f"segment {late} came after segment 2"):
            fold.add(late, layer_statistics(late))


def test_one_segment_is_its_own_sum() -> None:
    fold = Folding()
    fold.add(0, layer_statistics(1))
    assert torch.equal(fold.total().pair_sum, layer_statistics(1).pair_sum)
