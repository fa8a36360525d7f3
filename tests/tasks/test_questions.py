"""Answers to questions about continuations, against the whole model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.evaluation.losses import ORIGINAL
from moekern.model import journal, state_folder
from moekern.model.compute import Compute
from moekern.model.journal import Resume
from moekern.model.layerwise import LayerwiseModel
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.tasks import questions as questions_module
from moekern.tasks.questions import Question, answers, arranged, asked_of
from tests.helpers import families

MakeCheckpoint = Callable[[str], Path]


@pytest.mark.parametrize("name", ["qwen3_moe"])
def test_answers_are_those_of_models_in_memory(
    name: str, family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any], tmp_path: Path
) -> None:
    folder = family_checkpoint(name)
    ids = families.input_ids(name, 3, 9, 0).tolist()
    questions = [asked_of(row[:cut], row[cut:], 8) for row in ids for cut in (1, 4, 8)]
    questions += [Question((*ids[0][:5], token), 1) for token in (1, 2, 3)]  # what they give is one sequence
    plan = Plan({key: LayerPlan((0, 2, 5, 7)) for key in find_layout(open_checkpoint(folder)).layers}, {})
    compute = Compute(dtype=torch.float32)
    found = answers(folder, questions, {"half": plan}, compute)
    prune(folder, plan, tmp_path / "half")
    assert found["half"] == answers(tmp_path / "half", questions, {}, compute)[ORIGINAL]
    model = whole_model(name)
    for question in questions:
        given = torch.tensor(question.ids[:-1])[None]
        logp = families.forward(model, given)[0].double().log_softmax(-1)[-question.scored :]
        wanted = torch.tensor(question.ids[-question.scored :])
        value, likeliest = found[ORIGINAL][question]
        assert value == pytest.approx(float(logp.gather(1, wanted[:, None]).sum()), rel=1e-4)
        assert likeliest == bool((logp.argmax(1) == wanted).all())


@pytest.mark.parametrize("layer", [2, pytest.param(99, marks=pytest.mark.whole)])
def test_what_was_stopped_goes_on_to_the_same_answers(
    layer: int, family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In front of a layer, and when all were done."""
    folder = family_checkpoint("qwen3_moe")
    questions = [asked_of(row[:4], row[4:], 64) for row in families.input_ids("qwen3_moe", 3, 9, 0).tolist()]
    plan = Plan({key: LayerPlan((0, 2, 5, 7)) for key in find_layout(open_checkpoint(folder)).layers}, {})
    want = answers(folder, questions, {"half": plan})
    monkeypatch.setattr(journal, "SHARE", 0)
    loads, met = LayerwiseModel._load, list[int]()

    def load(self: LayerwiseModel, i: int, after: int | None) -> None:
        met.append(i)
        if met.count(layer) == 1 and i == layer:
            raise KeyboardInterrupt
        loads(self, i, after)

    def done(folder: Path) -> None:
        if layer == 99 and met.count(99) == 0:
            met.append(99)
            raise KeyboardInterrupt
        state_folder.removed(folder)

    monkeypatch.setattr(LayerwiseModel, "_load", load)
    monkeypatch.setattr(questions_module, "removed", done)
    with pytest.raises(KeyboardInterrupt):
        answers(folder, questions, {"half": plan}, resume=Resume(tmp_path / "state"))
    before = len(met)
    assert answers(folder, questions, {"half": plan}, resume=Resume(tmp_path / "state", tell=lambda line: None)) == want
    assert met[before:] == list(range(layer, families.LAYERS))
    assert not list((tmp_path / "state").glob("*"))


def test_a_sequence_that_questions_share_is_computed_once() -> None:
    one, two, other = Question((1, 2, 3), 1), Question((1, 2, 4), 1), Question((1, 2, 3, 4), 2)
    data, asked = arranged([one, two, one, other])
    assert [batch.input_ids.tolist() for batch in data.batches] == [[[1, 2, 3]], [[1, 2]]]
    assert asked == (((other,),), ((one, two),))


def test_what_is_too_long_loses_its_front() -> None:
    assert asked_of([1, 2, 3, 4], [5, 6], 8) == Question((1, 2, 3, 4, 5, 6), 2)
    assert asked_of([1, 2, 3, 4], [5, 6], 3) == Question((3, 4, 5, 6), 2)
    assert asked_of([1], [2, 3, 4, 5], 3) == Question((2, 3, 4, 5), 3)
