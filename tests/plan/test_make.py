"""From statistics to a plan: provenance, domains, seeds, super experts."""

from dataclasses import fields, replace

import pytest
import torch

from moekern import files
from moekern.criteria import CRITERIA, criterion_named
from moekern.errors import InputError
from moekern.plan.budgets import Budget
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.guards import Guards
from moekern.plan.make import make_plan
from moekern.plan.provenance import remarks
from moekern.router import Router
from moekern.statistics.file import Statistics
from moekern.statistics.header import router_of
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import FINGERPRINT, Layer, Model, header, layer_statistics, model_statistics


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_criterion_makes_a_plan_that_passes_the_check(criterion, groups):
    s = model_statistics(n_group=groups, topk_group=groups)
    plan = make_plan(s, criterion, 4, seed=3)
    layers = dict.fromkeys(("0", "2", "10"), Layer(6))
    check_plan(plan, Model(Router(6, 2, groups, groups), layers=layers, mtp={}), FINGERPRINT)
    assert list(plan.layers) == ["0", "2", "10"]
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert make_plan(s, criterion, 4, seed=3).to_json() == plan.to_json()


def test_a_plan_says_where_it_comes_from(tmp_path):
    model_statistics().save(tmp_path / "s")
    s = Statistics.load(tmp_path / "s")
    assert (
        make_plan(s, "reap", 0.5, domains=["code"]).provenance.items()
        >= {
            "fingerprint": FINGERPRINT,
            "statistics": files.sha256(tmp_path / "s"),
            "criterion": "reap",
            "domains": ["code"],
            "keep": 0.5,
            "kept": 3,
            "num_experts": 6,
            "tie": "lowest expert number",
            "seed": 0,
            "protect_super": False,
        }.items()
    )


def test_a_plan_counts_only_the_named_domains():
    s = model_statistics()
    code = make_plan(s, "gated_norm", 3, domains=["code"]).layers["2"]
    assert code.scores == tuple(s.layers["2"]["code"].gated_norm_sum.tolist())
    assert code.scores != make_plan(s, "gated_norm", 3).layers["2"].scores


def test_keeping_everything_is_a_plan():
    plan = make_plan(model_statistics(), "hope", 1.0)
    assert {layer.keep for layer in plan.layers.values()} == {tuple(range(6))}


def test_seeds_change_a_random_plan():
    s = model_statistics()
    assert make_plan(s, "random", 3, seed=1).layers != make_plan(s, "random", 3, seed=2).layers


def test_a_given_router_goes_before_the_recorded_one():
    s = model_statistics()
    assert router_of(s.header) == Router(6, 2)
    with pytest.raises(InputError, match="not a multiple of the router's 2 groups"):
        make_plan(s, "reap", 3, Router(6, 2, 2, 2, 1))


def statistics_with_a_super_expert():
    """Eight layers; expert 0 of layer 1 is rarely used and extremely loud at its loudest."""
    layers = {str(i): {"a": layer_statistics(i)} for i in range(8)}
    s = layers["1"]["a"]
    s.max_abs[0] = 1e4
    for name in ("norm_sum", "gated_norm_sum", "norm_square_sum", "gated_norm_square_sum", "gate_sum", "square_sum"):
        getattr(s, name)[0] *= 1e-6
    s.pair_sum[0] *= 1e-6
    s.pair_sum[:, 0] *= 1e-6
    return Statistics(header(["a"]), layers)


@pytest.mark.parametrize("criterion", ["reap", "hope"])
def test_super_experts_are_kept_recorded_and_not_written_into_statistics(criterion):
    s = statistics_with_a_super_expert()
    before = {f.name: getattr(s.layers["1"]["a"], f.name).clone() for f in fields(s.layers["1"]["a"])}
    free, guarded = make_plan(s, criterion, 3), make_plan(s, criterion, 3, protect_super=True)
    assert 0 not in free.layers["1"].keep
    assert 0 in guarded.layers["1"].keep
    assert len(guarded.layers["1"].keep) == 3
    assert guarded.provenance["protect_super"] == {"1": [0]}
    assert all(guarded.layers[k].keep == free.layers[k].keep for k in free.layers if k != "1")
    for name, value in before.items():
        assert torch.equal(getattr(s.layers["1"]["a"], name), value)


@pytest.mark.parametrize("criterion", ["reap", "hope"])
def test_more_super_experts_than_places_are_an_input_error(criterion):
    s = statistics_with_a_super_expert()
    layers = {**s.layers, **{str(i): s.layers["0"] for i in range(8, 100)}}
    for i in range(3):
        layers["1"]["a"].max_abs[i] = 1e4 + i
    with pytest.raises(InputError, match=r"--protect-super: layer 1: 3 protected experts \[0, 1, 2\], but it keeps 2"):
        make_plan(Statistics(s.header, layers), criterion, 2, protect_super=True)


def test_layers_of_different_sizes_take_a_count_but_no_share():
    layers = {"0": {"a": layer_statistics(0)}, "1": {"a": layer_statistics(1, experts=4)}}
    s = Statistics(header(["a"]), layers)
    assert {len(p.keep) for p in make_plan(s, "reap", 3).layers.values()} == {3}
    with pytest.raises(InputError, match=r"--keep 0.5: layers have different numbers of experts \(4, 6\)"):
        make_plan(s, "reap", 0.5)
    with pytest.raises(InputError, match="--keep 5: layer 1: more than the 4 experts"):
        make_plan(s, "reap", 5)


def test_an_unknown_criterion_or_domain_is_an_input_error():
    with pytest.raises(InputError, match="--criterion best: unknown"):
        make_plan(model_statistics(), "best", 3)
    with pytest.raises(InputError, match="no domain 'law'"):
        make_plan(model_statistics(), "reap", 3, domains=["law"])


def test_domains_without_tokens_are_an_input_error():
    layers = {"0": {"a": layer_statistics(0), "b": LayerStatistics.zeros(6, 5)}}
    s = Statistics(header(["a", "b"]), layers)
    assert make_plan(s, "reap", 3).layers["0"].keep == make_plan(s, "reap", 3, domains=["a"]).layers["0"].keep
    with pytest.raises(InputError, match="layer 0: no token was routed"):
        make_plan(s, "hope", 3, domains=["b"])


def test_domains_are_weighed_one_by_one_where_the_criterion_says_so() -> None:
    statistics = model_statistics()
    plan = make_plan(statistics, "worst_domain(gated_norm)", 3)
    for key, parts in statistics.layers.items():
        want = criterion_named("worst_domain(gated_norm)").function(parts, 3)
        assert plan.layers[key].keep == want.keep
    one = make_plan(statistics, "worst_domain(gated_norm)", 3, domains=["code"])
    assert one.layers["0"].keep == make_plan(statistics, "gated_norm", 3, domains=["code"]).layers["0"].keep


def test_weights_are_planned_from_without_any_text() -> None:
    statistics = model_statistics(domains=("prose",))
    for parts in statistics.layers.values():
        for name in ("tokens", "count"):
            getattr(parts["prose"], name).zero_()
    assert len(make_plan(statistics, "rank(aimer, rwn)", 2).layers["0"].keep) == 2
    with pytest.raises(InputError, match="layer 0: no token was routed to any expert"):
        make_plan(statistics, "rank(aimer, reap)", 2)


def scored(scores, groups=1):
    """Statistics of as many layers as rows, by which `usage` ranks experts like `scores`."""
    layers = {}
    for n, row in enumerate(scores):
        sums = LayerStatistics.zeros(len(row))
        count = torch.tensor(row)
        layers[str(n)] = {"text": replace(sums, tokens=count.sum()[None], count=count)}
    top = header(domains=["text"], tokens={"text": sum(scores[0])}, num_experts=len(scores[0]), top_k=1)
    return Statistics(top | {"n_group": groups, "topk_group": groups}, layers)


def test_a_choice_by_expert_number_is_said():
    s = scored([[5, 5, 5, 5], [4, 1, 1, 3], [9, 2, 2, 0], [1, 2, 3, 4]])
    plan = make_plan(s, "usage", 3)
    assert plan.provenance["ties"] == {"0": 4, "1": 2}
    assert remarks(plan) == [
        "all scores are equal in 1 of 4 layers (0): the lowest expert numbers stay",
        "experts tie where the choice ends in 1 of 4 layers (1): the lowest expert numbers stay",
    ]
    assert "ties" not in make_plan(scored([[1, 2, 3, 4]] * 2), "usage", 3).provenance
    assert remarks(make_plan(scored([[1, 2, 3, 4]] * 2), "usage", 2)) == []


def test_ties_are_looked_for_where_scores_decide():
    s = scored([[7, 1, 1, 7]])
    assert make_plan(s, "usage", 2).provenance.get("ties") is None
    assert make_plan(scored([[7, 1, 1, 7]], groups=2), "usage", 2).provenance.get("ties") is None
    assert make_plan(scored([[7, 7, 1, 7]], groups=2), "usage", 2).provenance["ties"] == {"0": 2}
    protected = Guards(keep_always={"0": (2,)})
    assert make_plan(s, "usage", 3, guards=protected).provenance.get("ties") is None  # 1 is dropped by its score
    dropped = Guards(drop_first={"0": (0,)})
    assert make_plan(s, "usage", 1, guards=dropped).provenance.get("ties") is None
    assert make_plan(model_statistics(), "hope", 4).provenance.get("ties") is None


@pytest.mark.parametrize(
    ("keep", "experts", "groups", "multiple_of", "line"),
    [
        (0.95, 8, 1, 1, "--keep 0.95: 7.6 of 8 experts is rounded to all of them: nothing is dropped"),
        (0.65, 8, 4, 1, "--keep 0.65: 5.2 of 8 experts are asked for"),
        (0.9, 8, 4, 1, "nothing is dropped"),
        (7, 8, 1, 4, "--keep 7: 7 of 8 experts are asked for, 4 are kept"),
        (0.6, 8, 1, 1, None),
        (1.0, 8, 1, 1, None),
        (8, 8, 1, 1, None),
    ],
)
def test_another_number_than_was_asked_for_is_said(keep, experts, groups, multiple_of, line):
    s = scored([list(range(1, experts + 1))], groups)
    found = remarks(make_plan(s, "usage", keep, budget=Budget(multiple_of=multiple_of)))
    assert (len(found) == 1 and line in found[0]) if line else not found


@pytest.mark.parametrize(
    "criterion", ["union(aimer, rwn)", "intersection(ewn, rwn)", "worst_domain(aimer)", "round_robin(ews)"]
)
def test_what_goes_first_goes_first_for_sets_chosen_by_weights_alone(criterion):
    s = model_statistics()
    for e in range(6):
        plan = make_plan(s, criterion, 4, guards=Guards(drop_first={"2": (e,)}))
        assert e not in plan.layers["2"].keep


def test_no_expert_is_idle_to_sets_chosen_by_weights_alone():
    s = model_statistics()
    idle = {d: replace(part, count=torch.zeros(6, dtype=torch.int64)) for d, part in s.layers["2"].items()}
    deaf = replace(s, layers={**s.layers, "2": idle})
    assert make_plan(deaf, "union(aimer, rwn)", 3).layers == make_plan(s, "union(aimer, rwn)", 3).layers


@pytest.mark.parametrize("criterion", ["worst_domain(reap)", "round_robin(reap)"])
def test_the_order_in_which_domains_were_measured_decides_nothing(criterion):
    s = model_statistics()
    turned = replace(s, layers={key: dict(reversed(parts.items())) for key, parts in s.layers.items()})
    for kept in range(2, 6):
        assert make_plan(turned, criterion, kept).layers == make_plan(s, criterion, kept).layers
