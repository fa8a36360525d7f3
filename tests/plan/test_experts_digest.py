"""Which plans make the same model."""

from dataclasses import replace

from moekern.plan.document import LayerPlan, Plan
from moekern.plan.refit import experts_digest
from moekern.plan.replacement import Replacement

PLAN = Plan({"0": LayerPlan((0, 2)), "1": LayerPlan((1, 3))})


def test_scores_and_provenance_do_not_tell_models_apart() -> None:
    scored = Plan({"1": LayerPlan((1, 3), (0.5, 1.0)), "0": LayerPlan((0, 2))}, {"criterion": "reap", "seed": 1})
    assert experts_digest(scored) == experts_digest(PLAN)


def test_what_decides_bytes_does() -> None:
    groups = (((0, 1.0), (1, 0.5)), ((2, 1.0),))
    merged = Plan({"0": LayerPlan((0, 2), groups=groups), "1": LayerPlan((1, 3))})
    others = [
        PLAN,
        Plan({**PLAN.layers, "1": LayerPlan((1, 2))}),
        Plan({"0": LayerPlan((0, 2), channels=((0, 1), (2, 3))), "1": LayerPlan((1, 3), channels=((0, 1), (2, 3)))}),
        merged,
        replace(merged, provenance={"merge": {"align": "none"}}),
        replace(PLAN, replace=Replacement("zero", None, None)),
        replace(PLAN, replace=Replacement("mean", "5" * 64, None)),
        replace(PLAN, provenance={"refit": {"recipe": "6" * 64, "layers": {"0": {}}}}),
    ]
    assert len({experts_digest(each) for each in others}) == len(others)
