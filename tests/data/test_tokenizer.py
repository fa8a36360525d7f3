"""Long texts are tokenised in pieces, and have the tokens of the whole."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from moekern.data.rows import Passage
from moekern.data.tokenizer import Tokenizer
from moekern.demo import MODEL, TEXT


@pytest.mark.parametrize("domain", ["c", "german"])
def test_pieces_have_the_tokens_of_the_whole(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (TEXT / domain / "calibration.txt").read_text()
    loaded = AutoTokenizer.from_pretrained(MODEL)
    monkeypatch.setattr("moekern.data.tokenizer.PIECE", 500)
    found = Tokenizer(MODEL, False).encode(Passage(text))
    assert found == [*loaded(text, verbose=False)["input_ids"], loaded.eos_token_id]


def test_a_line_without_end_is_cut_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekern.data.tokenizer.PIECE", 50)
    tokenizer = Tokenizer(MODEL, False)
    assert tokenizer.get().decode(tokenizer.encode(Passage("x y " * 1000, ends=False))) == "x y " * 1000
