import json
from typing import Any

import numpy as np
import pytest

from moekern.errors import InputError
from moekern.plan.channels import channel_count, channel_ids, channel_text
from moekern.plan.document import FORMAT, NARROW, LayerPlan, Plan


def narrow(channels: Any, keep: Any = (1, 0)) -> str:
    return json.dumps({"format": NARROW, "layers": {"0": {"keep": list(keep), "channels": channels}}})


@pytest.mark.parametrize("width", [1, 4, 7, 8, 13, 64])
def test_a_text_names_its_channels(width: int) -> None:
    rng = np.random.default_rng(width)
    for _ in range(20):
        channels = np.flatnonzero(rng.random(width) < 0.5)
        if not len(channels):
            continue
        text = channel_text(channels, width)
        assert channel_ids(text).tolist() == channels.tolist()
        assert channel_count(text) == len(channels)
        assert len(text) <= -(-width // 4)


def test_channels_come_back_from_a_file() -> None:
    plan = Plan({"0": LayerPlan((0, 2), None, ("a", "48")), "1": LayerPlan((1, 3), None, ("c", "03"))}, {"a": 1})
    assert plan.width == 2
    assert json.loads(plan.to_json())["format"] == NARROW
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_of_whole_experts_is_written_as_before() -> None:
    plan = Plan({"0": LayerPlan((0, 2))})
    assert plan.width is None
    assert json.loads(plan.to_json()) == {"format": FORMAT, "layers": {"0": {"keep": [0, 2]}}, "provenance": {}}


def test_a_person_may_list_channels_in_any_order() -> None:
    plan = Plan.from_json(narrow([[3, 1], [0, 2]]))
    assert plan.layers["0"] == LayerPlan((0, 1), None, (channel_text(np.array([0, 2]), 4), "5"))


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        ([[0, 1]], "one entry for each of the 2 kept experts"),
        ("ff", "one entry for each of the 2 kept experts"),
        (None, "one entry for each of the 2 kept experts"),
        ([[0, 0], [0, 1]], "expert 1: one is listed twice"),
        ([[], [0]], "expert 1: expected numbers of channels"),
        ([[0], ["x"]], "expert 0: expected numbers of channels"),
        (["zz", "ff"], "hexadecimal digits"),
        (["", "ff"], "hexadecimal digits"),
        (["0", "0"], "expected numbers of channels"),
        ([[-1], [0]], "expected numbers of channels"),
        ([[1 << 40], [0]], "expected numbers of channels"),
        ([[0], [0, 1]], "expert 1 has 1 channels, and the first one of the plan 2"),
    ],
)
def test_what_is_no_list_of_channels_is_one_line(channels: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Plan.from_json(narrow(channels), "plan.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("plan.json: layer")


def test_channels_are_unknown_to_the_first_format() -> None:
    with pytest.raises(InputError, match="unknown key 'channels'|unknown key"):
        Plan.from_json(json.dumps({"format": FORMAT, "layers": {"0": {"keep": [0], "channels": [[0]]}}}))


def test_layers_must_be_of_one_width() -> None:
    text = Plan({"0": LayerPlan((0,), None, ("a",)), "1": LayerPlan((0,), None, ("e",))}).to_json()
    with pytest.raises(InputError, match="expert 0 has 3 channels"):
        Plan.from_json(text)
