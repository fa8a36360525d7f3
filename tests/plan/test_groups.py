"""Groups of a plan: what a person may write, what is refused, and who must not take such a plan for another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moekern.errors import InputError
from moekern.plan.document import NARROW, LayerPlan, Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.groups import merge_recipe, model_digest
from moekern.plan.interchange import convert
from moekern.plan.refit import kept_digest
from moekern.pruning.prune import prune
from tests.helpers.measured import FINGERPRINT, Model
from tests.helpers.synthetic import qwen3, write

KEEP = [0, 2, 3, 7]


def text(groups: Any, keep: list[int] = KEEP, **others: Any) -> str:
    layers = {"0": {"keep": keep, "groups": groups}, "10": {"keep": KEEP, **others}}
    return json.dumps({"format": NARROW, "layers": layers})


def test_a_plan_with_groups_is_read_and_written() -> None:
    plan = Plan.from_json(text({"3": {"3": 2, "5": 1, "1": 0}, "7": {"7": 5}}, [7, 3, 0, 2]))
    assert plan.layers["0"].groups == (((0, 1.0),), ((2, 1.0),), ((1, 0.0), (3, 2.0), (5, 1.0)), ((7, 1.0),))
    assert plan.layers["10"].groups is None
    assert Plan.from_json(plan.to_json()).layers == plan.layers
    assert json.loads(plan.to_json())["layers"]["0"]["groups"] == {"3": {"1": 0.0, "3": 2.0, "5": 1.0}}
    check_plan(plan, Model(), FINGERPRINT)
    alone = Plan.from_json(text({"3": {"3": 2}}))
    assert not alone.merges
    assert json.loads(alone.to_json())["format"] == "moekern.plan/1"


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ({"3": {"3": 1, "5": 1}, "7": {"7": 1, "5": 1}}, "member 5 is in the group of expert 3 too"),
        ({"3": {"3": 1, "2": 1}}, "member 2 stays itself"),
        ({"4": {"4": 1, "5": 1}}, "expert 4 has members, and does not stay"),
        ({"3": {"5": 1}}, "expert 3 is not among its own members"),
        ({"3": {"3": 1, "5": -1}}, "weight of 5: expected a number from 0 on, got -1"),
        ({"3": {"3": 1, "5": True}}, "weight of 5: expected a number"),
        ({"3": {"3": 1, "5": "1"}}, "weight of 5: expected a number"),
        ({"3": {"3": 1, "5": 10**400}}, "weight of 5: expected a number"),
        ({"3": {"3": 1e308, "5": 1.7e308}}, "add up to no number above 0"),
        ({"3": {"3": 0, "5": 0}}, "add up to no number above 0"),
        ({"3": {"3": 1, "05": 1}}, "expected expert numbers"),
        ({"3": {"3": 1, "-5": 1}}, "expected expert numbers"),
        ({"3": [3, 5]}, "groups: expected an object"),
        ([[3, 5]], "groups: expected an object"),
    ],
)
def test_hostile_groups_are_refused(groups: Any, problem: str) -> None:
    with pytest.raises(InputError, match="layer '?\"?0.*" + problem) as found:
        Plan.from_json(text(groups))
    assert "\n" not in str(found.value)


def test_numbers_that_json_does_not_have_and_members_twice_are_refused() -> None:
    for odd, problem in (('{"3": {"3": NaN}}', "'NaN' is not a finite"), ('{"3": {"3": 1, "3": 2}}', "duplicate key")):
        with pytest.raises(InputError, match=problem):
            Plan.from_json(text(None).replace("null", odd))


def test_groups_that_do_not_fit_the_model_are_refused() -> None:
    for groups, problem in (
        ((((0, 1.0), (8, 1.0)),), "member 8 is out of range"),
        ((((0, float("nan")), (4, 1.0)),), "weight of 0: expected a number"),
        ((((0, 1.0),), ((2, 1.0),)), "groups of 2 experts, and 1 are kept"),
    ):
        plan = Plan({"0": LayerPlan((0,), groups=groups), "10": LayerPlan((0,))})  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"layer 0: .*{problem}"):
            check_plan(plan, Model(), FINGERPRINT)
    turned = LayerPlan((1, 0), groups=(((1, 1.0), (4, 1.0)), ((0, 1.0),)))
    with pytest.raises(InputError, match="layer 0: groups: the experts that stay are not in rising order"):
        check_plan(Plan({"0": turned, "10": LayerPlan((0, 1))}), Model(), FINGERPRINT)
    mtp = LayerPlan((0, 1), groups=(((0, 1.0), (4, 1.0)), ((1, 1.0),)))
    with pytest.raises(InputError, match=r"layer mtp.0: experts of MTP layers are not merged"):
        check_plan(Plan({"0": LayerPlan((0, 1)), "10": LayerPlan((0, 1)), "mtp.0": mtp}), Model(), FINGERPRINT)


def test_groups_and_channels_do_not_go_together() -> None:
    with pytest.raises(InputError, match="unknown key 'channels'"):
        Plan.from_json(text({}, channels=["f"] * 4))


def test_what_was_merged_of_a_twin_is_the_model_of_its_plan() -> None:
    """A plan of statistics of one, carried out on the other; a refit of what was merged is another model."""
    plan = replace(Plan.from_json(text({"3": {"3": 1, "5": 1}})), provenance={"fingerprint": "a" * 64})
    made = {
        of: {"recipe": merge_recipe(plan, of), "fingerprint": of, "layers": {"0": {}}} for of in ("a" * 64, "b" * 64)
    }
    whole = [replace(plan, provenance={**plan.provenance, "refit": told}) for told in made.values()]
    assert len({model_digest(each) for each in (plan, *whole)}) == 1
    told = made["b" * 64]
    for other in ({**told, "recipe": "0" * 64}, {**told, "fingerprint": "a" * 64}):
        changed = replace(plan, provenance={**plan.provenance, "refit": other})
        assert model_digest(changed) != model_digest(plan)


def test_groups_decide_what_computed_layers_belong_to() -> None:
    plain, merged = LayerPlan((0, 1)), LayerPlan((0, 1), groups=(((0, 1.0), (4, 1.0)), ((1, 1.0),)))
    assert kept_digest(plain) != kept_digest(merged)


def test_a_plan_whose_weights_are_computed_is_not_carried_out_as_if_it_dropped(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *qwen3())
    plan = Plan.from_json(text({"3": {"3": 1, "5": 1}}).replace('"10"', '"1"'))
    with pytest.raises(InputError, match="plan: merges experts, .*merge-experts"):
        prune(source, plan, tmp_path / "out")
    plan.save(tmp_path / "plan.json")
    with pytest.raises(InputError, match="merges experts, for which llm-compressor has no words"):
        convert(tmp_path / "plan.json", "llm-compressor", source, lambda *given: {})
    kept, provenance = LayerPlan((0, 1, 2, 3)), {"refit": {"recipe": "0" * 64, "layers": {"0": {}}}}
    Plan({"0": kept, "1": kept}, provenance).save(tmp_path / "plan.json")
    with pytest.raises(InputError, match="is of layers that were refitted, for which llm-compressor has no words"):
        convert(tmp_path / "plan.json", "llm-compressor", source, lambda *given: {})
    assert {path.name for path in tmp_path.iterdir()} == {"in", "plan.json"}
