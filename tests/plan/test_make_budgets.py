"""Plans whose layers may keep different numbers: counts first, then the experts, with guards, for every criterion."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern.criteria import CRITERIA
from moekern.errors import InputError
from moekern.plan.budgets import Budget
from moekern.plan.document import NONUNIFORM, Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.guards import Guards
from moekern.plan.make import make_plan
from moekern.plan.targets import Target
from moekern.router import Router
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import FINGERPRINT, Layer, Model, header, layer_statistics, model_statistics

BUDGETS = {
    "global": Budget("global", allow_nonuniform=True),
    "global by z-score": Budget("global", normalise="zscore", allow_nonuniform=True),
    "usage": Budget("adaptive", allow_nonuniform=True),
    "entropy": Budget("adaptive", by="entropy", allow_nonuniform=True),
    "waterfill": Budget("waterfill", allow_nonuniform=True),
    "with a floor": Budget("waterfill", floor=3, allow_nonuniform=True),
    "in twos": Budget("waterfill", multiple_of=2, allow_nonuniform=True),
}


def counts_of(plan):
    return {key: len(layer.keep) for key, layer in plan.layers.items()}


@pytest.fixture(scope="module")
def measured():
    """For tests that only plan: drawing these sums takes far longer than a plan."""
    return model_statistics()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_makes_a_plan_that_can_be_executed(measured, criterion, budget):
    s, asked = measured, BUDGETS[budget]
    uniform = make_plan(s, criterion, 4)
    if asked.kind == "waterfill" and any(max(layer.scores) < 0 for layer in uniform.layers.values()):
        with pytest.raises(InputError, match="--budget waterfill: layer [0-9]+ has no scores above 0"):
            make_plan(s, criterion, 4, budget=asked)
        return
    made = make_plan(s, criterion, 4, budget=asked)
    counts = counts_of(made)
    assert sum(counts.values()) == 12
    assert all(n % asked.multiple_of == 0 and n >= (asked.floor or 2) for n in counts.values())
    model = Model(Router(6, 2), layers=dict.fromkeys(("0", "2", "10"), Layer(6)), mtp={})
    check_plan(made, model, FINGERPRINT)
    assert (NONUNIFORM in made.provenance) == (len(set(counts.values())) > 1)
    assert made.provenance["kept"] == (counts if len(set(counts.values())) > 1 else 4)
    assert make_plan(s, criterion, 4, budget=asked).to_json() == made.to_json()
    assert Plan.from_json(made.to_json()).to_json() == made.to_json()
    if len(set(counts.values())) == 1:  # the same counts, the same plan as without a budget
        assert made.layers == uniform.layers


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 30),
    kind=st.sampled_from(["global", "adaptive", "waterfill"]),
    share=st.floats(4 / 9, 1),  # of 18: the lowest counts come to 8 where two guarded experts are in one of two groups
    groups=st.sampled_from([1, 2]),
    kept=st.sets(st.integers(0, 5), max_size=2),
    gone=st.sets(st.integers(0, 5), max_size=2),
)
def test_budgets_respect_groups_guards_and_the_total(seed, kind, share, groups, kept, gone):
    s = model_statistics(seed, n_group=groups, topk_group=groups, group_top=1)
    guards = Guards(keep_always={"2": tuple(sorted(kept))}, drop_first={"10": tuple(sorted(gone))})
    made = make_plan(s, "gated_norm", share, budget=Budget(kind, allow_nonuniform=True), guards=guards)
    counts = counts_of(made)
    total = math.floor(share * 18 + 1e-9)
    assert total - groups < sum(counts.values()) <= total or set(counts.values()) == {6}
    assert kept <= set(made.layers["2"].keep)
    stay = set(made.layers["10"].keep)
    for g in range(groups):
        group = set(range(g * 6 // groups, (g + 1) * 6 // groups))
        assert not stay & gone & group or stay >= group - gone


def loud_and_quiet():
    """Layer 0's experts matter evenly and little, layer 1 leans on two of six."""
    even, peaked = layer_statistics(0), layer_statistics(0)
    for sums, mass in ((even, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]), (peaked, [500.0, 400, 1, 1, 1, 1])):
        sums.gated_norm_sum.copy_(torch.tensor(mass))
        sums.count.copy_(torch.tensor([10, 10, 10, 10, 10, 10]))
    return Statistics(header(["a"]), {"0": {"a": even}, "1": {"a": peaked}})


def test_what_is_even_keeps_more_unless_raw_scores_are_ranked():
    s = loud_and_quiet()
    assert counts_of(make_plan(s, "gated_norm", 4, budget=BUDGETS["waterfill"])) == {"0": 6, "1": 2}
    raw = make_plan(s, "gated_norm", 4, budget=Budget("global", floor=2, allow_nonuniform=True))
    assert counts_of(raw) == {"0": 6, "1": 2}  # 1.1 to 1.5 are still more than 1
    s.layers["1"]["a"].gated_norm_sum[2:] = 5
    raw = make_plan(s, "gated_norm", 4, budget=Budget("global", floor=2, allow_nonuniform=True))
    assert counts_of(raw) == {"0": 2, "1": 6}


def test_entropy_gives_less_to_the_undecided_router():
    s = loud_and_quiet()
    for key, nats in (("0", 0.0), ("1", math.log(2.0))):
        s.layers[key]["a"].entropy_sum[0] = nats * int(s.layers[key]["a"].logit_tokens)
    made = make_plan(s, "reap", 3, budget=Budget("adaptive", by="entropy", allow_nonuniform=True))
    assert counts_of(made) == {"0": 4, "1": 2}  # twice the effective experts, half the count
    s.layers["0"]["a"].logit_tokens[0] = 0
    with pytest.raises(InputError, match="--adaptive-by entropy: layer 0: the statistics hold no router logits"):
        make_plan(s, "reap", 3, budget=Budget("adaptive", by="entropy", allow_nonuniform=True))


def test_idle_experts_weigh_nothing_across_layers():
    """An idle expert's score marks it as last inside its layer; ranked across layers it is worth 0."""
    idle = layer_statistics(0, idle=(4, 5))
    used = layer_statistics(1)
    s = Statistics(header(["a"]), {"0": {"a": idle}, "1": {"a": used}})
    for normalise in ("none", "sum", "max", "mean"):
        made = make_plan(s, "reap", 5, budget=Budget("global", normalise=normalise, allow_nonuniform=True))
        assert counts_of(made) == {"0": 4, "1": 6}


@pytest.mark.parametrize("normalise", ["none", "sum", "max", "mean", "zscore"])
def test_what_idle_experts_a_layer_has_changes_no_count_of_the_others(normalise):
    """Two layers of the same six used experts; one has three idle ones more. Both keep the same experts."""
    idle = layer_statistics(0, experts=9, idle=(6, 7, 8))
    plain = LayerStatistics(**{name: _first_six(value) for name, value in idle.tensors().items()})
    s = Statistics(header(["a"], num_experts=9), {"0": {"a": plain}, "1": {"a": idle}})
    made = make_plan(s, "reap", 4, budget=Budget("global", normalise=normalise, allow_nonuniform=True))
    assert made.layers["0"].keep == made.layers["1"].keep
    assert len(made.layers["0"].keep) == 4


def _first_six(value):
    for axis, size in enumerate(value.shape):
        if size == 9:
            value = value.narrow(axis, 0, 6)
    return value


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget("waterfill"), "--budget waterfill --keep 4: layers would keep 2 to 6 experts; engines load one"),
        (Budget("global", floor=6, allow_nonuniform=True), "--keep: 8 experts in all, but the layers' lowest .* 12"),
        (Budget("global", multiple_of=7, allow_nonuniform=True), "0: none of its counts is a multiple of 7"),
    ],
)
def test_budgets_that_do_not_work_are_refused(budget, message):
    with pytest.raises(InputError, match=message):
        make_plan(loud_and_quiet(), "gated_norm", 4, budget=budget)


def test_an_engine_refuses_different_counts_even_where_they_are_allowed():
    with pytest.raises(InputError, match="vllm would not run it: layers have 2 to 6 experts"):
        make_plan(loud_and_quiet(), "gated_norm", 4, budget=BUDGETS["waterfill"], targets=[Target("vllm")])


def test_layers_of_different_sizes_share_a_budget():
    layers = {"0": {"a": layer_statistics(0)}, "1": {"a": layer_statistics(1, experts=4)}}
    s = Statistics(header(["a"]), layers)
    made = make_plan(s, "gated_norm", 0.7, budget=BUDGETS["waterfill"])
    assert sum(counts_of(made).values()) == 7
    with pytest.raises(InputError, match="layer 1: no token was routed"):
        make_plan(
            Statistics(header(["a"]), {**layers, "1": {"a": LayerStatistics.zeros(4, 5)}}),
            "reap", 0.7, budget=BUDGETS["global"],
        )  # fmt: skip
