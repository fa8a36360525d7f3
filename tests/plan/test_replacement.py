"""Plans that say what stands for dropped experts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan, planned_mtp
from moekern.plan.fits_model import check_plan
from moekern.plan.replacement import Replacement
from moekern.router import Router
from tests.helpers.measured import FINGERPRINT, Model

LAYERS = {"0": LayerPlan((1,)), "10": LayerPlan((0, 2, 3))}


def test_a_person_can_write_one() -> None:
    plan = Plan.from_json(
        '{"format": "moekern.plan/2", "replace": {"constants": "zero"}, "layers": {"0": {"keep": [2, 1]}}}'
    )
    assert plan.replace == Replacement("zero")
    assert plan.layers["0"].keep == (1, 2)
    assert planned_mtp(plan) == "keep"
    assert planned_mtp(Plan(plan.layers)) == "prune"


@pytest.mark.parametrize("asked", [Replacement("zero"), Replacement("mean", "a" * 64, ("code", "maths"))])
def test_round_trip(asked: Replacement) -> None:
    plan = Plan(LAYERS, {"criterion": "reap"}, asked)
    text = plan.to_json()
    assert json.loads(text)["format"] == "moekern.plan/2"
    assert Plan.from_json(text).replace == asked
    assert repr(plan).startswith(f"Plan(1 to 3 experts in each of 2 layers, the others {asked.constants}, reap, ")
    assert Plan.from_json(text).to_json() == text
    assert plan.digest != Plan(LAYERS, {"criterion": "reap"}).digest


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("mean", "expected an object with"),
        ({"constants": "median"}, "one of zero, mean, least-squares"),
        ({"constants": "mean", "values": []}, "unknown key"),
        ({"constants": "mean", "statistics": 3}, "statistics: expected the sha256"),
        ({"constants": "mean", "domains": []}, "domains: expected a list of names"),
    ],
)
def test_what_is_none(value: Any, reason: str) -> None:
    document = {"format": "moekern.plan/2", "replace": value, "layers": {"0": {"keep": [1]}}}
    with pytest.raises(InputError, match=reason):
        Plan.from_json(json.dumps(document))
    with pytest.raises(InputError, match="unknown key"):
        Plan.from_json(json.dumps(document | {"format": "moekern.plan/1"}))


def test_the_router_asks_nothing_of_counts() -> None:
    """Another number in each layer, one group empty, fewer than a token chooses; but one expert at least."""
    model = Model(Router(8, 2, 2, 1))
    plan = Plan(LAYERS, {}, Replacement("zero"))
    assert check_plan(plan, model, FINGERPRINT, replaced=True) is None
    with pytest.raises(InputError, match="replaces dropped experts by constants; prune, verify and evaluate take"):
        check_plan(plan, model, FINGERPRINT)
    with pytest.raises(InputError, match="fewer than the 2|multiple of"):
        check_plan(Plan(LAYERS), model, FINGERPRINT, replaced=True)
    narrow = {key: LayerPlan((0,), None, ("f",)) for key in LAYERS}
    merged = {key: LayerPlan((0,), groups=(((0, 1.0), (4, 1.0)),)) for key in LAYERS}
    for layers, provenance, reason in (
        (narrow, {}, "do one of both"),
        (merged, {}, "merges them into those that stay"),
        (LAYERS, {"refit": {}}, "was refitted for experts that are gone"),
        ({"0": LayerPlan((1,)), "10": LayerPlan((8,))}, {}, "expert 8 is out of range"),
    ):
        with pytest.raises(InputError, match=reason):
            check_plan(Plan(layers, provenance, Replacement("zero")), model, FINGERPRINT, replaced=True)
