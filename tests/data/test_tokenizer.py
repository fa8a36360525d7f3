"""Long texts are tokenised in pieces, and have the tokens of the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from moekern.data import process
from moekern.data.read import read_data
from moekern.data.rows import Document, Passage
from moekern.data.tokenizer import Tokenizer
from moekern.demo import MODEL, TEXT
from moekern.errors import InputError
from tests.helpers.text import CHATML, folder_of, read


def ids_of(tokenizer: Tokenizer, *documents: Document) -> list[np.ndarray]:
    found = [tokens.ids for tokens in tokenizer.start(documents)()]
    return [ids for ids in found if isinstance(ids, np.ndarray)]


@pytest.mark.parametrize("domain", ["c", "german"])
def test_pieces_have_the_tokens_of_the_whole(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (TEXT / domain / "calibration.txt").read_text()
    loaded = AutoTokenizer.from_pretrained(MODEL)
    monkeypatch.setattr("moekern.data.tokenizer.PIECE", 500)
    (found,) = ids_of(Tokenizer(MODEL, False), Passage(text))
    assert found.tolist() == [*loaded(text, verbose=False)["input_ids"], loaded.eos_token_id]


def test_a_line_without_end_is_cut_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekern.data.tokenizer.PIECE", 50)
    tokenizer = Tokenizer(MODEL, False)
    (found,) = ids_of(tokenizer, Passage("x y " * 1000, ends=False))
    assert tokenizer.get().decode(found) == "x y " * 1000


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
ENDLESS = {"type": "Split", "pattern": {"Regex": r"(a|a)*b|(\w+\s?)+$"}, "behavior": "Isolated", "invert": False}
NO_UNKNOWN = {"type": "WordLevel", "vocab": {"b": 0, "c": 1}, "unk_token": "[UNK]"}


def _replace(by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "e"}, "content": by}


def _folder(path: Path, parts: dict[str, Any]) -> Path:
    folder_of(path)
    file = path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return path


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [ENDLESS, BYTES]}}, "it fails: "),
        ({"model": NO_UNKNOWN, "added_tokens": [], "post_processor": None}, "it fails: WordLevel error"),
        ({"normalizer": _replace("e" * 10**6)}, "it takes more than [0-9]+ bytes"),
        ({"normalizer": {"type": "Sequence", "normalizers": [_replace("ee")] * 40}}, "it takes more than [0-9]+ bytes"),
        ({"normalizer": _replace("e" * 100)}, "it makes 500,[0-9]+ token ids of 5,[0-9]+ characters"),
    ],
    ids=["panic", "no unknown token", "one long word", "doubled 40 times", "many ids"],
)
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_tokenizer_that_fails_or_takes_too_much_is_ended_in_one_line(
    parts: dict[str, Any], reason: str, chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MEMORY", 1 << 28)
    folder, text = _folder(tmp_path / "model", parts), "a" * 60 + "!" + "e" * 5000
    row = {"messages": [{"role": "user", "content": text}]} if chat else {"text": text}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=f"^{folder}: no usable tokenizer; .*{reason}") as raised:
        read_data([str(tmp_path / "d.jsonl")], folder)
    assert "\n" not in str(raised.value)


def test_what_texts_take_together_has_a_limit_that_grows_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = "{% for i in range(99999) %}{% endfor %}{{ messages[0].content }}"
    folder = folder_of(tmp_path / "model", loop)
    rows = [json.dumps({"messages": [{"role": "user", "content": "x"}]})] * 50
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(process, "AT_FIRST", 0.05)
    monkeypatch.setattr(process, "EACH_TEXT", 10.0)
    assert read(folder, tmp_path / "d.jsonl")[0].count("x") == 50
    monkeypatch.setattr(process, "EACH_TEXT", 0.0)
    with pytest.raises(InputError, match="(the chat template|it) is too slow"):  # whichever was at work
        read(folder, tmp_path / "d.jsonl")


@pytest.mark.parametrize("name", ["missing", "file", "file/within"])
def test_a_folder_that_is_not_there_has_no_tokenizer(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("some text")
    with pytest.raises(InputError, match=f"{name}: no usable tokenizer; .*: no such folder"):
        read_data([str(tmp_path / "file")], tmp_path / name)


ASKING = CHATML + "{% if add_generation_prompt %}<assistant>{% endif %}"
SAID = [("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "22")]
CONVERSATION = {"messages": [{"role": role, "content": text} for role, text in SAID]}
EARLIER = "<user>one?<|im_end|>\n<assistant>1<|im_end|>\n"
PAIR = {"prompt": "two?", "completion": "22"}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(
    ("template", "row", "asked", "answer"),
    [
        (ASKING, CONVERSATION, EARLIER + "<user>two?<|im_end|>\n<assistant>", "22<|im_end|>\n"),
        (ASKING, PAIR, "<user>two?<|im_end|>\n<assistant>", "22<|im_end|>\n"),
        (CHATML, PAIR, "<user>two?<|im_end|>\n", "<assistant>22<|im_end|>\n"),
        (None, PAIR, "<s>two?\n\n", "22"),
        (None, {"text": "all of it"}, "", "<s>all of it"),
    ],
)  # fmt: skip
def test_answers_are_told_apart(
    template: str | None, row: dict[str, Any], asked: str, answer: str, pack: bool, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "model", template)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = read_data([str(tmp_path / "rows.jsonl")], folder, pack=pack, answers=True)
    plain = read_data([str(tmp_path / "rows.jsonl")], folder, pack=pack)
    (batch,), (same,), loaded = data.batches, plain.batches, Tokenizer(folder, False).get()
    assert torch.equal(batch.input_ids, same.input_ids)
    assert same.answers is None
    assert batch.answers is not None
    ids, marks = batch.input_ids[0], batch.answers[0]
    ends = "</s>" if pack and template is None else ""
    assert (loaded.decode(ids[~marks]), loaded.decode(ids[marks])) == (asked, answer + ends)
    assert data.recipe["answers"]
    assert "answers" not in plain.recipe


def test_what_has_no_answer_is_left_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", ASKING)
    rows = [CONVERSATION, {"messages": CONVERSATION["messages"][:3]}, {"input_ids": [1, -2, 3]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="2 of 3 rows .*the last one is no answer"):
        data = read_data([str(tmp_path / "rows.jsonl")], folder, pack=False, answers=True)
    assert len(data.batches) == 1
