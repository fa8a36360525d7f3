"""Prompts: what of a text a model is to continue."""

from __future__ import annotations

from pathlib import Path

import pytest

from moekern.data.read import read_data
from moekern.errors import InputError
from tests.helpers.text import folder_of, lines, shown

ASKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "A very long second question?"}, {"role": "assistant", "content": "No."},
]  # fmt: skip


def prompts(folder: Path, path: Path, count: int = 10, length: int = 4) -> list[str]:
    return shown(read_data([str(path)], folder, prompts=count, sequence_length=length, tell=lambda line: None), folder)


def test_a_conversation_is_asked_up_to_its_last_answer(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", ASKING, begins=False)
    whole = (
        "<user>Rain?<|im_end|>\n<assistant>Yes.<|im_end|>\n<user>A very long second question?<|im_end|>\n<assistant>"
    )
    rows = [{"messages": TALK}, {"prompt": "Why?", "completion": "So."}, {"messages": TALK[:1]}]
    found = prompts(folder, lines(tmp_path / "a.jsonl", rows))
    assert sorted(found) == sorted([whole, "<user>Why?<|im_end|>\n<assistant>", "<user>Rain?<|im_end|>\n<assistant>"])


def test_without_a_template_a_question_is_followed_by_a_blank_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", None, begins=False)
    rows = [{"instruction": "Add.", "input": "1, 2", "output": "3"}]
    assert prompts(folder, lines(tmp_path / "a.jsonl", rows)) == ["Add.\n\n1, 2\n\n"]


def test_rows_give_their_beginning_and_files_pieces_of_one_length(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", ASKING, begins=False)
    found = prompts(folder, lines(tmp_path / "a.jsonl", [{"text": "abcdefgh"}, {"text": "xyz"}]))
    assert sorted(found) == ["abcd", "xyz"]
    (tmp_path / "b.txt").write_text("abcdefghijk")
    assert sorted(prompts(folder, tmp_path / "b.txt")) == ["abcd", "efgh"]
    few = prompts(folder, lines(tmp_path / "c.jsonl", [{"text": f"{n:04}"} for n in range(100)]), count=7)
    assert len(set(few)) == 7
    assert few != sorted(few)


def test_an_answer_without_a_question_is_left_out_and_an_amount_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", ASKING, begins=False)
    path = lines(tmp_path / "a.jsonl", [{"messages": TALK[1:2]}, {"messages": TALK[:2]}])
    said: list[str] = []
    found = read_data([str(path)], folder, prompts=5, sequence_length=4, tell=said.append)
    assert shown(found, folder) == ["<user>Rain?<|im_end|>\n<assistant>"]
    assert any("there is nothing to ask" in line for line in said)
    assert any("1 prompts of 1 read, fewer than the 5 asked for" in line for line in said)
    with pytest.raises(InputError, match="--prompts says how many"):
        read_data([f"a={path}:200k"], folder, prompts=5, sequence_length=4)
