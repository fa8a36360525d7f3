"""Answers to questions about continuations, against the whole model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.evaluation.losses import ORIGINAL
from moekern.model.compute import Compute
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.tasks.questions import Question, answers, arranged, asked_of
from moekern.tasks.settings import Score, rows, shots_of
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


def test_a_sequence_that_questions_share_is_computed_once() -> None:
    one, two, other = Question((1, 2, 3), 1), Question((1, 2, 4), 1), Question((1, 2, 3, 4), 2)
    data, asked = arranged([one, two, one, other])
    assert [batch.input_ids.tolist() for batch in data.batches] == [[[1, 2, 3]], [[1, 2]]]
    assert asked == (((other,),), ((one, two),))


def test_what_is_too_long_loses_its_front() -> None:
    assert asked_of([1, 2, 3, 4], [5, 6], 8) == Question((1, 2, 3, 4, 5, 6), 2)
    assert asked_of([1, 2, 3, 4], [5, 6], 3) == Question((3, 4, 5, 6), 2)
    assert asked_of([1], [2, 3, 4, 5], 3) == Question((2, 3, 4, 5), 3)


def test_the_table_has_a_row_a_metric_and_a_column_a_model() -> None:
    def score(model: str, task: str, shots: int, value: float, stderr: float | None = 0.1) -> Score:
        return Score(model, task, shots, "acc", "none", value, stderr, 9, True)

    some = [score("original", "a", 0, 0.5), score("original", "b", 0, 1, None), score("original", "a", 2, 0.75)]
    columns, table = rows([*some, score("half", "a", 0, 0.25)])
    assert columns == ("task", "shots", "metric", "original", "half")
    assert table == [
        ("a", "0", "acc", "0.5000 ± 0.1000", "0.2500 ± 0.1000"),
        ("a", "2", "acc", "0.7500 ± 0.1000", ""),
        ("b", "0", "acc", "1.0000", ""),
    ]


def test_numbers_of_examples() -> None:
    assert shots_of("0, 1,5,1") == (0, 1, 5)
    for text in ("", "one", "0,x", "-1", "1.5"):
        with pytest.raises(InputError, match="--shots .*: expected numbers"):
            shots_of(text)
