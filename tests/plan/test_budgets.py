"""Budgets against brute force: what each promises, found by trying every combination of counts."""

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern.errors import InputError
from moekern.plan.budgets import (
    Bounds,
    Budget,
    adaptive_entropy,
    adaptive_usage,
    bounds_of,
    fill,
    global_counts,
    normalised,
    total_of,
    uniform_count,
    waterfill,
)
from moekern.plan.choose import choose_top
from moekern.router import Router, count_problem

# Whole numbers divided by 8: sums are exact, so that ties are ties.
SCORES = st.integers(0, 40).map(lambda n: n / 8)


@st.composite
def problems(draw):
    """Scores of 1 to 4 layers, their bounds, a total within reach, groups, experts kept in any case."""
    groups = draw(st.sampled_from([1, 1, 2]))
    size = draw(st.integers(1, 6 // groups))
    multiple = draw(st.sampled_from([1, 1, 2, 3]))
    router = Router(groups * size, draw(st.integers(1, 2)), groups, groups)
    step = (groups * multiple) if multiple % groups else multiple
    if step > router.num_experts or router.top_k > router.num_experts // step * step:
        multiple, step = 1, groups
    if router.top_k > router.num_experts:
        router = Router(router.num_experts, 1, groups, groups)
    keys = [str(i) for i in range(draw(st.integers(1, 4)))]
    scores = {key: draw(st.lists(SCORES, min_size=groups * size, max_size=groups * size)) for key in keys}
    first = {key: draw(st.sets(st.integers(0, groups * size - 1), max_size=1)) for key in keys}
    bounds = {}
    for key in keys:
        least = max(draw(st.integers(1, 2)), groups * len(first[key]))
        try:
            bounds[key] = bounds_of(router, floor=least, multiple_of=multiple)
        except InputError:
            bounds[key] = bounds_of(router, multiple_of=multiple)
            first[key] = set() if bounds[key].lowest < groups else first[key]
    total = draw(st.integers(sum(b.lowest for b in bounds.values()), len(keys) * groups * size + 2))
    return scores, bounds, total, groups, first


def kept_value(scores, count, groups, first):
    return sum(scores[e] for e in choose_top(scores, count, groups=groups, protected=first))


def best_value(scores, bounds, total, groups, first):
    """The largest sum of kept scores over all counts within bounds and total."""
    choices = [[b.lowest, *b.steps()] for b in bounds.values()]
    sums = [
        sum(kept_value(scores[k], n, groups, first[k]) for k, n in zip(scores, counts, strict=True))
        for counts in product(*choices)
        if sum(counts) <= total
    ]
    return max(sums)


@settings(deadline=None, max_examples=300)
@given(problems())
def test_global_keeps_the_most_and_uses_the_budget(problem):
    scores, bounds, total, groups, first = problem
    counts = global_counts(scores, bounds, total, groups=groups, protected=first)
    step = bounds["0"].step
    for key, count in counts.items():
        assert count in (bounds[key].lowest, *bounds[key].steps())
    spent = sum(counts.values())
    assert spent <= total
    assert total - spent < step or all(counts[k] == bounds[k].highest for k in counts)
    got = sum(kept_value(scores[k], counts[k], groups, first[k]) for k in scores)
    assert got == best_value(scores, bounds, total, groups, first)


@settings(deadline=None, max_examples=300)
@given(problems())
def test_waterfill_drops_the_least_share(problem):
    scores, bounds, total, groups, first = problem
    counts = waterfill(scores, bounds, total, groups=groups, protected=first)
    shares = {key: normalised(row, "sum", key) for key, row in scores.items()}
    got = sum(kept_value(shares[k], counts[k], groups, first[k]) for k in scores)
    # up to 24 shares are added up in another order
    assert got == pytest.approx(best_value(shares, bounds, total, groups, first), abs=24 * 2**-52)


def test_waterfill_counts_what_is_below_zero_as_nothing():
    bounds = {"0": Bounds(1, 3, 1), "1": Bounds(1, 3, 1)}
    assert waterfill({"0": [4.0, -9.0, -9.0], "1": [2.0, 1.0, 1.0]}, bounds, 4) == {"0": 1, "1": 3}


def test_global_ranks_raw_scores_and_normalised_ones_differently():
    scores = {"loud": [40.0, 30.0, 20.0, 10.0], "quiet": [4.0, 0.0, 3.0, 3.5]}
    bounds = dict.fromkeys(scores, Bounds(1, 4, 1))
    assert global_counts(scores, bounds, 5) == {"loud": 4, "quiet": 1}
    assert global_counts(scores, bounds, 5, normalise="max") == {"loud": 2, "quiet": 3}
    # z-scores: loud 1.3, 0.4, -0.4, -1.3; quiet 0.9, -1.7, 0.2, 0.6
    assert global_counts(scores, bounds, 5, normalise="zscore") == {"loud": 2, "quiet": 3}


def test_usage_follows_the_published_rule():
    """Each layer's largest becomes 1; the B largest values of all layers are kept, so flat layers keep more."""
    usage = {"flat": [10.0, 9.0, 9.0, 8.0], "peaked": [100.0, 20.0, 10.0, 5.0], "middle": [6.0, 3.0, 2.0, 1.0]}
    bounds = dict.fromkeys(usage, Bounds(1, 4, 1))
    pooled = sorted((v / max(row), key) for key, row in usage.items() for v in row)[::-1]
    for total in range(3, 13):
        want = {key: sum(k == key for _, k in pooled[:total]) for key in usage}
        assert adaptive_usage(usage, bounds, total) == want


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 5), min_size=1, max_size=6),
    st.integers(1, 16),
    st.sampled_from([1, 2, 4]),
    st.data(),
)
def test_entropy_shares_in_inverse_proportion(entropies, highest, step, data):
    keys = [str(i) for i in range(len(entropies))]
    bounds = dict.fromkeys(keys, Bounds(step, step * highest, step))
    total = data.draw(st.integers(step * len(keys), step * highest * len(keys)))
    counts = adaptive_entropy(dict(zip(keys, entropies, strict=True)), bounds, total)
    assert total - step < sum(counts.values()) <= total
    for a, b in product(range(len(keys)), repeat=2):  # nobody has a step that another would make more of
        gets, gives = counts[keys[a]], counts[keys[b]]
        if gets < step * highest and gives > step:
            assert entropies[a] - entropies[b] >= math.log(gives / (gets + step)) - 1e-9


def test_equal_layers_are_filled_in_order():
    assert fill({"a": [1.0, 1.0], "b": [1.0, 1.0]}, dict.fromkeys("ab", Bounds(1, 3, 1)), 5) == {"a": 3, "b": 2}


def test_a_budget_below_the_floors_is_refused():
    with pytest.raises(InputError, match="3 experts in all, but the layers' lowest counts .* come to 4; keep more"):
        fill({"a": [1.0], "b": [1.0]}, dict.fromkeys("ab", Bounds(2, 3, 1)), 3)


@pytest.mark.parametrize(
    ("router", "floor", "multiple", "bounds"),
    [
        (Router(128, 8), 1, 1, Bounds(8, 128, 1)),
        (Router(128, 8), 0.25, 1, Bounds(32, 128, 1)),
        (Router(128, 8), 1, 48, Bounds(48, 96, 48)),
        (Router(64, 6, 8, 3, 2), 1, 1, Bounds(16, 64, 8)),
        (Router(64, 6, 8, 3, 2), 20, 12, Bounds(24, 48, 24)),
        (Router(10, 2), 0.3, 1, Bounds(3, 10, 1)),  # 3 in spite of 0.3 * 10 being a little more in binary
    ],
)
def test_bounds_are_what_router_floor_and_multiple_allow(router, floor, multiple, bounds):
    got = bounds_of(router, floor=floor, multiple_of=multiple)
    assert got == bounds
    assert all(count_problem(n, router) is None for n in (got.lowest, *got.steps()))


@settings(deadline=None)
@given(st.floats(0.01, 1), st.integers(1, 64), st.sampled_from([1, 2, 4]), st.integers(1, 16), st.integers(1, 12))
def test_a_uniform_count_is_a_legal_multiple_not_above(share, multiple, groups, size, top_k):
    router = Router(groups * size, top_k, groups, groups)
    try:
        count = uniform_count(share, router, multiple)
    except InputError:
        return
    assert count % multiple == 0
    assert count_problem(count, router) is None
    assert count <= share * router.num_experts + groups / 2 + 1e-6


def test_uniform_with_a_multiple_goes_down():
    assert uniform_count(60, Router(128, 8), 32) == 32
    assert uniform_count(0.5, Router(60, 4), 8) == 24
    with pytest.raises(InputError, match="--keep 20 is 20 experts; with --multiple-of 32 the least is 32"):
        uniform_count(20, Router(128, 8), 32)
    with pytest.raises(InputError, match="none of its counts is a multiple of 256"):
        uniform_count(20, Router(128, 8), 256)


def test_totals_are_never_above_the_share():
    assert total_of(0.5, {"a": 5, "b": 6}) == 5
    assert total_of(0.35, {"a": 10, "b": 10}) == 7
    assert total_of(4, {"a": 5, "b": 6}) == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "fair"}, "--budget fair: expected one of uniform, global"),
        ({"kind": "global", "normalise": "l2"}, "--normalise l2: expected one of"),
        ({"kind": "waterfill", "normalise": "max"}, "--normalise max: goes with --budget global, not with waterfill"),
        ({"kind": "adaptive", "by": "luck"}, "--adaptive-by luck: expected one of usage, entropy"),
        ({"by": "entropy"}, "--adaptive-by entropy: goes with --budget adaptive"),
        ({"floor": 4}, "--floor 4: goes with the budgets other than uniform"),
        ({"kind": "global", "floor": 0}, "--floor 0: expected a share above 0"),
        ({"multiple_of": 0}, "--multiple-of 0: expected a count from 1"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Budget(**values)


def test_scores_below_zero_have_no_share():
    with pytest.raises(InputError, match="--normalise sum: layer 3 has scores below 0; use zscore or none"):
        normalised([1.0, -1.0], "sum", "3")
    assert normalised([2.0, 2.0], "zscore", "3") == [0.0, 0.0]
    assert normalised([0.1] * 3, "zscore", "3") == [0.0] * 3  # whose mean is not 0.1
    assert normalised([0.0, 0.0], "sum", "3") == [0.0, 0.0]


def test_idle_experts_take_no_part_in_what_normalises_a_layer():
    row = [1.0, -9.0, 3.0]
    assert normalised(row, "none", "3", [1]) == [1.0, 0.0, 3.0]
    assert normalised(row, "mean", "3", [1]) == [0.5, 0.0, 1.5]
    assert normalised(row, "max", "3", [1]) == [1 / 3, 0.0, 1.0]
    assert normalised(row, "zscore", "3", [1]) == [-1.0, -1.0, 1.0]
    assert normalised([-1.0, -9.0, -3.0], "none", "3", [1]) == [-1.0, -3.0, -3.0]
    assert normalised(row, "sum", "3", [0, 1, 2]) == [0.0, 0.0, 0.0]
