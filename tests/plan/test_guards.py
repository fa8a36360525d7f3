"""Experts that stay or go whatever their score, against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern.errors import InputError
from moekern.plan.choose import choose_top
from moekern.plan.guards import (
    Behaviour,
    Guards,
    contrast,
    distinctive,
    domain_masses,
    marks,
    parse_behaviours,
    parse_experts,
    parse_floors,
)
from moekern.plan.make import make_plan
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import header, layer_statistics, model_statistics

CRITERIA = ("reap", "hope", "random")


def test_experts_are_named_by_layer():
    assert parse_experts("--keep-always", ["3:17,4", "enc.0:1", "3:4"]) == {"3": (4, 17), "enc.0": (1,)}
    assert parse_behaviours("--guard", ["code", "a,b=3"]) == (Behaviour(("code",), 10), Behaviour(("a", "b"), 3))
    assert parse_floors(["0.8", "code=90%"]) == {"": 0.8, "code": 0.9}


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (lambda t: parse_experts("--keep-always", [t]), "3", "--keep-always 3: expected LAYER:EXPERT"),
        (lambda t: parse_experts("--drop-first", [t]), "3:", "--drop-first 3:: expected LAYER:EXPERT"),
        (lambda t: parse_experts("--drop-first", [t]), "3:-1", "expected LAYER:EXPERT"),
        (lambda t: parse_experts("--drop-first", [t]), ":1", "expected LAYER:EXPERT"),
        (lambda t: parse_experts("--drop-first", [t]), "3:1,", "expected LAYER:EXPERT"),
        (lambda t: parse_experts("--drop-first", [t]), "3:" + "9" * 5000, "expected LAYER:EXPERT"),
        (lambda t: parse_behaviours("--guard", [t]), "code=0", "--guard code=0: expected DOMAIN or DOMAIN=COUNT"),
        (lambda t: parse_behaviours("--guard", [t]), "code=", "expected DOMAIN or DOMAIN=COUNT"),
        (lambda t: parse_behaviours("--guard", [t]), "code=x", "expected DOMAIN or DOMAIN=COUNT"),
        (lambda t: parse_floors([t]), "code=1", "--domain-floor code=1: expected a share"),
        (lambda t: parse_floors([t]), "2.0", "--domain-floor 2.0: expected a share above 0"),
        (lambda t: parse_floors([t, t]), "0.5", "--domain-floor 0.5: all domains has a floor already"),
    ],
)
def test_guards_that_mean_nothing_are_refused(parse, text, message):
    with pytest.raises(InputError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("guards", "message"),
    [
        (Guards(keep_always={"7": (1,)}), "--keep-always 7: no such layer; the statistics hold 0, 2, 10"),
        (Guards(drop_first={"2": (6,)}), "--drop-first 2:6: the layer has experts 0 to 5"),
        (Guards(guard=(Behaviour(("law",)),)), "--guard law: no such domain; the statistics hold prose, code"),
        (Guards(suppress=(Behaviour(("prose", "code")),)), "--suppress prose,code: no domain is left to compare with"),
        (Guards(keep_always={"2": (1,)}, drop_first={"2": (1,)}), "layer 2: expert 1 is to be kept .* and dropped"),
        (Guards(domain_floor={"law": 0.5}), "--domain-floor law: no such domain"),
        (Guards(keep_always={"2": (0, 1, 2, 3)}), "--keep-always: layer 2: 4 protected experts .* but it keeps 3"),
    ],
)
def test_guards_that_do_not_fit_are_refused(guards, message):
    with pytest.raises(InputError, match=message):
        make_plan(model_statistics(), "reap", 3, guards=guards)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("groups", [1, 2])
def test_named_experts_stay_and_go(criterion, groups):
    s = model_statistics(n_group=groups, topk_group=groups, group_top=1)
    guards = Guards(keep_always={"2": (0,)}, drop_first={"2": (5,), "10": (4, 5)})
    plan = make_plan(s, criterion, 4, guards=guards)
    free = make_plan(s, criterion, 4)
    assert 0 in plan.layers["2"].keep
    assert 5 not in plan.layers["2"].keep
    # with two groups each drops one of its three experts, so one of 4 and 5 stays
    assert len({4, 5} & set(plan.layers["10"].keep)) == groups - 1
    assert plan.layers["0"] == free.layers["0"]
    assert plan.provenance["guards"] == {"keep_always": {"2": [0]}, "drop_first": {"2": [5], "10": [4, 5]}}


@pytest.mark.parametrize("criterion", ["reap", "hope"])
def test_what_goes_first_goes_before_the_idle(criterion):
    s = Statistics(header(["a"]), {"0": {"a": layer_statistics(0, idle=(1, 3))}})
    assert make_plan(s, criterion, 4).layers["0"].keep == (0, 2, 4, 5)
    kept = make_plan(s, criterion, 4, guards=Guards(drop_first={"0": (5,)})).layers["0"].keep
    assert 5 not in kept
    assert set(kept) >= {0, 2, 4}


def labelled():
    """Two layers, domains that route differently: x uses experts 4 and 5 of layer 1, y the others alike."""
    layers = {}
    for i, key in enumerate(("0", "1")):
        x, y = layer_statistics(i), layer_statistics(i)
        if key == "1":
            x.count.copy_(torch.tensor([0, 0, 0, 0, 50, 30]))
            y.count.copy_(torch.tensor([20, 20, 20, 20, 0, 0]))
        layers[key] = {"x": x, "y": y}
    return Statistics(header(["x", "y"]), layers)


def test_the_contrast_is_the_difference_of_mean_activations():
    found = contrast(labelled(), ["x"])
    assert found["0"] == [0.0] * 6
    assert found["1"] == [-0.5, -0.5, -0.5, -0.5, 1.25, 0.75]
    assert contrast(labelled(), ["y"])["1"] == [-value for value in found["1"]]


def test_distinctive_experts_are_the_largest_differences():
    s = labelled()
    assert distinctive(s, Behaviour(("x",), 1)) == {"1": (4,)}
    assert distinctive(s, Behaviour(("x",), 99)) == {"1": (4, 5)}  # those that x uses no more than y are not its own
    assert distinctive(s, Behaviour(("y",), 3)) == {"1": (0, 1, 2)}


def test_guarded_behaviour_stays_and_suppressed_goes():
    s = labelled()
    plan = make_plan(s, "reap", 3, guards=Guards(guard=(Behaviour(("y",), 2),), suppress=(Behaviour(("x",), 2),)))
    assert set(plan.layers["1"].keep) >= {0, 1}
    assert {4, 5}.isdisjoint(plan.layers["1"].keep)
    assert plan.provenance["guards"] == {
        "guard": [{"domains": ["y"], "count": 2, "experts": {"1": [0, 1]}}],
        "suppress": [{"domains": ["x"], "count": 2, "experts": {"1": [4, 5]}}],
    }
    with pytest.raises(InputError, match="layer 1: expert 4 is to be kept"):
        make_plan(s, "reap", 3, guards=Guards(guard=(Behaviour(("x",)),), suppress=(Behaviour(("x",)),)))


def test_a_class_without_tokens_is_an_input_error():
    s = Statistics(header(["a", "b"]), {"0": {"a": layer_statistics(0), "b": LayerStatistics.zeros(6, 5)}})
    with pytest.raises(InputError, match="--guard b: layer 0 has no tokens of b"):
        distinctive(s, Behaviour(("b",)))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 50),
    floor=st.sampled_from([0.3, 0.6, 0.8, 0.95]),
    kept=st.integers(2, 6),
    criterion=st.sampled_from(["reap", "hope"]),
)
def test_floors_hold_or_are_refused(seed, floor, kept, criterion):
    s = model_statistics(seed)
    try:
        plan = make_plan(s, criterion, kept, guards=Guards(domain_floor={"": floor}))
    except InputError as error:
        assert str(error).startswith("--domain-floor: layer ")  # noqa: PT017
        assert kept < 6
        return
    for key, layer in plan.layers.items():
        assert len(layer.keep) == kept
        for domain in s.domains:
            mass = s.layer(key, [domain]).gated_norm_sum
            assert float(mass[list(layer.keep)].sum() / mass.sum()) >= floor - 1e-9


def test_the_worst_domain_is_served_first():
    """Each domain needs its own expert; the score alone keeps none of b's."""
    a, b = LayerStatistics.zeros(4, 5), LayerStatistics.zeros(4, 5)
    a.count.copy_(torch.tensor([100, 100, 0, 0]))
    b.count.copy_(torch.tensor([0, 0, 3, 1]))
    a.tokens[0], b.tokens[0] = 100, 2
    a.gated_norm_sum.copy_(torch.tensor([100.0, 90, 0, 0]))
    b.gated_norm_sum.copy_(torch.tensor([0.0, 0, 3, 1]))
    s = Statistics(header(["a", "b"], num_experts=4, tokens={"a": 100, "b": 2}), {"0": {"a": a, "b": b}})
    assert make_plan(s, "gated_norm", 2).layers["0"].keep == (0, 1)
    assert make_plan(s, "gated_norm", 2, guards=Guards(domain_floor={"": 0.5})).layers["0"].keep == (0, 2)
    assert make_plan(s, "gated_norm", 2, guards=Guards(domain_floor={"b": 1.0})).layers["0"].keep == (2, 3)
    with pytest.raises(InputError, match=r"layer 0: a keeps 0.526 of its mass, not 0.6, with 2 experts; keep more"):
        make_plan(s, "gated_norm", 2, guards=Guards(domain_floor={"a": 0.6, "b": 0.7}))
    assert domain_masses(s, "0", {"": 0.1, "b": 0.3}) == {
        "a": (0.1, [10 / 19, 9 / 19, 0, 0]),
        "b": (0.3, [0, 0, 0.75, 0.25]),
    }


def test_experts_that_go_first_are_last_in_the_ranking():
    assert choose_top([5, 4, 3, 2], 2, drop_first=[0]) == (1, 2)
    assert choose_top([5, 4, 3, 2], 4, drop_first=[0]) == (0, 1, 2, 3)
    assert choose_top([5, 4, 3, 2], 2, groups=2, drop_first=[0]) == (1, 2)


def test_no_guards_leave_nothing_marked():
    found = marks(model_statistics(), Guards())
    assert found.provenance == {}
    assert not any(found.kept.values())


def test_the_order_of_layers_in_the_file_changes_nothing():
    layers = {str(i): {"a": layer_statistics(i), "b": layer_statistics(50 + i)} for i in (0, 2, 9, 10)}
    layers["0"]["a"].max_abs[1] = 1e4  # super experts are looked for in the first three of four layers
    guards = Guards(protect_super=True, guard=(Behaviour(("a",), 5),), domain_floor={"": 0.4})
    plans = [
        make_plan(Statistics(header(["a", "b"]), {key: layers[key] for key in order}), "reap", 4, guards=guards)
        for order in (("0", "2", "9", "10"), ("10", "9", "2", "0"))
    ]
    assert plans[0].to_json() == plans[1].to_json()
    assert plans[0].provenance["protect_super"] == {"0": [1]}
