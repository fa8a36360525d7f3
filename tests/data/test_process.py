"""A chat template is a program of the checkpoint's author: it may not take the machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moekern.data import process
from moekern.data.read import read_data
from moekern.demo import MODEL
from moekern.errors import InputError

CONVERSATION = [{"role": "user", "content": "one two three four"}]


def model_with(template: str, folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def rows(folder: Path, count: int = 1) -> str:
    (folder / "d.jsonl").write_text("\n".join([json.dumps({"messages": CONVERSATION})] * count))
    return str(folder / "d.jsonl")


def test_conversations_become_their_text(tmp_path: Path) -> None:
    model = model_with("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}", tmp_path / "m")
    (tmp_path / "d.txt").write_text("user: one two three four ")
    told, plain = (
        read_data([f"a={path}"], model).batches[0].input_ids for path in (rows(tmp_path), tmp_path / "d.txt")
    )
    assert told.tolist() == plain.tolist()
    assert len(read_data([rows(tmp_path, 3)], model).batches[0].input_ids[0]) == 3 * told.shape[1]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
        ("{{ 9 ** (9 ** 9) }}", "more than 1 s"),
        ("{{ 'a' * 10 ** 12 }}", "more than [0-9]+ bytes"),
        ("{{ 'a'.zfill(10 ** 8) }}", "no text of at most"),
        ("{{ raise_exception('no\nsystem') }}", "cannot render it: no"),
        ("{{ messages.x.y }}", "'list object' has no attribute 'x'"),
        ("{% for", "cannot render it"),
    ],
)
def test_a_template_that_takes_too_much_is_ended(
    template: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SECONDS", 1)
    with pytest.raises(InputError, match=f"the chat template.*{reason}"):
        read_data([rows(tmp_path)], model_with(template, tmp_path / "m"))
