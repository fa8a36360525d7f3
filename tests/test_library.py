"""The library's functions, called with what they do not take: one line that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moekern
from moekern.data.batches import Batch, TokenData
from moekern.errors import speaking_flags
from moekern.plan.document import LayerPlan
from tests.helpers.synthetic import qwen3, write

PLAN = moekern.Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6))})
DATA = TokenData((Batch("a", torch.tensor([[1, 2, 3]])),), {})
ONE_TOKEN = TokenData((Batch("a", torch.tensor([[1]])),), {})
Call = Callable[[Path, Any], object]


@pytest.fixture(autouse=True)
def _errors_name_flags() -> None:
    """Not here, where errors speak to who calls the library."""


WRONG_TYPES: dict[str, tuple[Call, str]] = {
    "prune": (lambda model, x: moekern.prune(model, x, model.parent / "out"), "plan: expected Plan, got "),
    "part": (lambda model, x: moekern.prune(model, PLAN, model.parent / "out", part=x), "part: expected Part, got "),
    "verify": (lambda model, x: moekern.verify(model, x, model), "plan: expected Plan, got "),
    "compare_forward": (lambda model, x: moekern.compare_forward(model, x, model), "plan: expected Plan, got "),
    "evaluate": (lambda model, x: moekern.evaluate(model, x, {}), "data: expected TokenData, got "),
    "plans": (lambda model, x: moekern.evaluate(model, DATA, {"a": x}), "plan: expected Plan, got "),
    "calibrate": (lambda model, x: moekern.calibrate(model, x), "data: expected TokenData, got "),
    "compute": (lambda model, x: moekern.calibrate(model, DATA, x), "compute: expected Compute, got "),
    "make_plan": (lambda model, x: moekern.make_plan(x, "reap", 0.5), "statistics: expected Statistics, got "),
    "merge": (lambda model, x: moekern.merge([x]), "merge: expected Statistics, got "),
    "observe": (lambda model, x: moekern.observe(x).__enter__(), "model: expected PreTrainedModel, got "),
    "masked": (lambda model, x: moekern.masked(x, PLAN).__enter__(), "model: expected PreTrainedModel, got "),
    "steered": (lambda model, x: moekern.steered(x, "map.json").__enter__(), "model: expected PreTrainedModel, got "),
}


@pytest.mark.parametrize("value", [5, "x", [3]], ids=["int", "str", "list"])
@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_wrong_type_is_named(tmp_path: Path, name: str, value: object) -> None:
    call, message = WRONG_TYPES[name]
    model = write(tmp_path / "model", *qwen3("bf16"))
    with pytest.raises(TypeError, match=f"^{message}{type(value).__name__}$"):
        call(model, value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing to evaluate": (lambda model: moekern.evaluate(model, TokenData((), {}), {}), "no sequence of two tokens"),
    "nothing predicted": (lambda model: moekern.evaluate(model, ONE_TOKEN, {}), "domain a: no sequence of two tokens"),
    "two originals": (lambda model: moekern.evaluate(model, DATA, {"original": PLAN}), "a plan is named 'original'"),
    "nothing to measure": (lambda model: moekern.calibrate(model, TokenData((), {})), "the data hold no batch"),
    "no such mtp": (lambda model: moekern.prune(model, PLAN, model.parent / "out", mtp=""), "^mtp : expected one of"),  # type: ignore[arg-type]
    "another model's plan": (
        lambda model: moekern.compare_forward(model, moekern.Plan({"9": LayerPlan((0,))}), model),
        "layer '9' is not a MoE layer",
    ),
    "a long name": (lambda model: moekern.open_checkpoint("x" * 300), "no such folder"),
    "a long name of statistics": (lambda model: moekern.Statistics.load("x" * 300), "no such statistics file"),
    "no name": (lambda model: moekern.open_checkpoint("a\0b"), "no such folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(tmp_path: Path, name: str) -> None:
    call, message = REFUSED[name]
    model = write(tmp_path / "model", *qwen3("bf16"))
    with pytest.raises(moekern.InputError, match=message):
        call(model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_errors_name_arguments_and_on_the_command_line_flags() -> None:
    error = moekern.InputError("--keep-always 3: expected what --guard takes, not a--b")
    assert str(error) == "keep_always 3: expected what guard takes, not a--b"
    assert error.kind == "option"
    with speaking_flags():
        assert str(error) == "--keep-always 3: expected what --guard takes, not a--b"
