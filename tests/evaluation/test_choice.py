"""Choices between plans by held-back text."""

from __future__ import annotations

import torch

from moekern.evaluation.choice import alike, choice_document, choice_rows, doubt_of
from moekern.evaluation.losses import ORIGINAL, means
from moekern.plan.document import LayerPlan, Plan


def table_of(kl: dict[str, list[float]]) -> dict[str, object]:
    """Losses whose sequences of 4 tokens have these sums of KL."""
    rows = {name: torch.tensor([[5.0, each, 3, 4] for each in row]).double() for name, row in kl.items()}
    return means(kl, ((name, "d", each) for name, each in rows.items()))  # type: ignore[return-value]


def test_the_nearest_is_chosen_and_what_the_text_does_not_tell_is_said() -> None:
    near, far = [1.0, 2, 3, 1, 2], [9.0, 9, 9, 9, 9]
    found = choice_document(
        table_of({ORIGINAL: [0.0] * 5, "far": far, "near": near, "close": [1.1, 1.9, 3.1, 1.0, 2.0]}),  # type: ignore[arg-type]
        {"far": "far", "twin": "near"},
    )
    assert (found["chosen"], found["sequences"], found["tokens"]) == ("near", 5, 20)
    assert list(found["candidates"]) == ["near", "close", "far", "twin"]
    far_told = found["candidates"]["far"]["farther"]
    assert far_told["clear"]
    assert far_told["interval"][0] < far_told["mean"] == (45 - 9) / 20 < far_told["interval"][1]
    assert not found["candidates"]["close"]["farther"]["clear"]
    assert "5 sequences are too few to tell close from near" in str(doubt_of(found))
    rows = choice_rows(found)
    assert rows[0][-1] == "chosen"
    assert rows[-1][-1] == "the same experts as near"


def test_one_sequence_tells_nothing_apart() -> None:
    found = choice_document(table_of({"near": [1.0], "far": [3.0]}))  # type: ignore[arg-type]
    assert found["candidates"]["far"]["farther"] == {"mean": 0.5, "interval": [None, None], "clear": False}
    assert "1 sequences are too few to tell far from near" in str(doubt_of(found))


def test_plans_that_keep_the_same_are_one() -> None:
    one, other = Plan({"0": LayerPlan((0, 1), (1.0, 2.0))}), Plan({"0": LayerPlan((0, 2))})
    again = Plan({"0": LayerPlan((0, 1), (5.0, 4.0))})
    assert alike({"a": one, "b": other, "c": again}) == {"a": "a", "b": "b", "c": "a"}
