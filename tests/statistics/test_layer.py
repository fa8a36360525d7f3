"""The sums of a layer: shapes, addition, renaming of experts."""

from dataclasses import fields, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern.statistics.layer import TIERS, LayerStatistics
from tests.helpers.measured import E, H, assert_same, layer_statistics, with_tiers


def test_every_field_says_its_dtype_and_shape():
    s = LayerStatistics.zeros(7, 3, tiers=("vocabulary",), words=2)
    size = {"1": 1, "E": 7, "H": 3, "W": 2}
    measured = {"routed", "dimensions", "vocabulary"}
    for f in fields(s):
        value = getattr(s, f.name)
        assert value.dtype in (torch.int64, torch.float64)
        names, there = f.metadata["shape"].split(), f.metadata["tier"] in measured
        assert list(value.shape) == [size[d.rstrip("?")] if there or d[-1] != "?" else 0 for d in names]
    assert (s.num_experts, s.dimensions, s.tiers) == (7, 3, ("dimensions", "vocabulary"))
    assert s.problem(2) is None


def test_adding_sums_everything_but_the_maximum():
    a, b = with_tiers(layer_statistics(1), 1), with_tiers(layer_statistics(2), 2)
    with pytest.raises(ValueError, match="weight_gram: the two sides are of different weights"):
        a + replace(b, weight_gram=b.weight_gram + 1)
    total = a + b
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name == "coalitions":
            continue
        if f.metadata["merge"] == "same":
            want = x
        elif f.metadata["merge"] == "alike":  # of one run alone
            want = torch.zeros_like(x)
        else:
            want = torch.maximum(x, y) if f.name == "max_abs" else x | y if f.name == "vocabulary" else x + y
        assert torch.equal(getattr(total, f.name), want), f.name
    assert total.tiers == TIERS


def test_equal_coalitions_are_united():
    def named(rows):
        return {tuple(row[:-1]): row[-1] for row in rows.tolist()}

    a, b = with_tiers(layer_statistics(1), 1), with_tiers(layer_statistics(2), 2, tokens=3)
    b = replace(b, **{f.name: getattr(a, f.name)[:0] for f in fields(a) if f.metadata["tier"] == "weights"})
    x, y, total = named(a.coalitions), named(b.coalitions), (a + b).coalitions
    assert named(total) == {ids: x.get(ids, 0) + y.get(ids, 0) for ids in {*x, *y}}
    assert total.tolist() == sorted(total.tolist())
    assert torch.equal((a + a.like()).coalitions, a.coalitions)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(3)))
def test_the_order_of_batches_does_not_matter(order):
    parts = [layer_statistics(i, tokens=5) for i in range(3)]
    a, b, c = (parts[i] for i in order)
    # float64: three terms below 100, each addition within half an ulp of its result
    assert_same(a + b + c, parts[0] + (parts[1] + parts[2]), rtol=1e-15, atol=4 * 2.0**-47)


def test_adding_zeros_changes_nothing():
    a = layer_statistics(3)
    assert_same(a + LayerStatistics.zeros(E, H), a)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (LayerStatistics.zeros(E + 1, H), r"count: expected \[6\], got \[7\]"),
        (LayerStatistics.zeros(E, 1), r"square_sum: expected \[6, 5\], got \[6, 1\]"),
        (
            LayerStatistics.zeros(E, H, tiers=["gradient"]),
            r"gradient \(gradient_norm_sum\) is measured on one side only",
        ),
    ],
)
def test_other_sizes_do_not_add(other, problem):
    with pytest.raises(ValueError, match=r"\[LayerStatistics\] add: " + problem):
        layer_statistics(0) + other


def test_views_share_memory():
    class Some(NamedTuple):
        tokens: torch.Tensor
        pair_sum: torch.Tensor

    s = LayerStatistics.zeros(E)
    view = s.views(Some)
    view.tokens.add_(3)
    view.pair_sum[1, 2] += 4
    assert s.tokens.item() == 3
    assert s.pair_sum[1, 2] == 4


def test_permuting_renames_experts_on_every_axis():
    s, perm = with_tiers(layer_statistics(4)), torch.tensor([2, 0, 1, 5, 4, 3])
    p = s.permuted(perm)
    assert p.deletion_gram[0, 1] == s.deletion_gram[2, 0]
    assert p.subset_loss[0b000011] == s.subset_loss[0b000101]
    both = (s.coalitions[:, :2] == torch.tensor([0, 2])).all(1)
    assert torch.equal(p.coalitions[(p.coalitions[:, :2] == torch.tensor([0, 1])).all(1), 2], s.coalitions[both, 2])
    assert p.count[0] == s.count[2]
    assert p.coactivation[0, 1] == s.coactivation[2, 0]
    assert torch.equal(p.square_sum[3], s.square_sum[5])
    assert torch.equal(p.coactivation.diagonal(), p.count)
    assert_same(p.permuted(perm.argsort()), s)
