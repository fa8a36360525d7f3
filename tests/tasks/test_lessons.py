"""What tasks teach, as the harness asks it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moekern.checkpoint.folder import open_checkpoint
from moekern.demo import MODEL
from moekern.errors import InputError
from moekern.tasks import Asked
from moekern.tasks.lessons import lesson_data, lessons, read_lessons
from tests.helpers.asked import QUESTIONS, save_tasks

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


def test_lessons_are_prompts_with_their_right_answers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    some = lessons(Asked(("little_choice", "little_writing"), save_tasks(tmp_path / "tasks")))
    want = [("little_choice", q, f" {choices[gold]}") for q, choices, gold in QUESTIONS]
    assert list(some) == want + [("little_writing", q, " i") for q, _, _ in QUESTIONS]
    tokenizer, data = AutoTokenizer.from_pretrained(MODEL), lesson_data(open_checkpoint(MODEL), some, 512)
    found = set()
    for batch in data.batches:
        assert batch.answers is not None
        ids, marks = batch.input_ids[0], batch.answers[0]
        found.add((batch.domain, tokenizer.decode(ids[~marks]), tokenizer.decode(ids[marks])))
    assert found == set(some)
    short = lesson_data(open_checkpoint(MODEL), some, 4)
    assert {batch.input_ids.shape[1] for batch in short.batches} == {4}
    assert all(batch.answers is not None and bool(batch.answers[0, -1]) for batch in short.batches)


def test_a_task_that_teaches_nothing_is_refused(tmp_path: Path) -> None:
    tasks = save_tasks(tmp_path / "tasks")
    with pytest.raises(InputError, match="task little_text: loglikelihood_rolling has no right answers"):
        lessons(Asked(("little_text",), tasks))
    no_split = save_tasks(tmp_path / "no-split", training_split=None)
    with pytest.raises(InputError, match="task little_choice: its file names no training_split"):
        lessons(Asked(("little_choice",), no_split))


def test_rows_of_a_file_are_lessons(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b", "completion": " c"}, ensure_ascii=False) + "\n\n")
    assert read_lessons(path) == (("rows", "a\u2028b", " c"),)
    for bad in ("{}", "[]", '{"prompt": "a", "completion": ""}', '{"prompt": 1, "completion": "a"}', "nonsense"):
        path.write_text(bad + "\n")
        with pytest.raises(InputError, match=r"rows.jsonl: line 1: expected an object with \"prompt\""):
            read_lessons(path)
