"""Bytes of tokens against the text that they are of."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models

from moekern.data.token_bytes import token_bytes
from moekern.demo import MODEL

TEXTS = ("Plain words, and a tab\t.", "Ünïcode – 你好, мир 🙂", "  spaces\n\n")


def test_of_a_byte_level_vocabulary() -> None:
    sizes = token_bytes(MODEL)
    assert sizes is not None
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for text in TEXTS:
        assert int(sizes[torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)].sum()) == len(
            text.encode()
        )
    special = [i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special]
    assert special
    assert not sizes[special].any()


def test_of_pieces_and_bytes_by_number(tmp_path: Path) -> None:
    pieces = ["<s>", *(f"<0x{n:02X}>" for n in range(256)), "▁wo", "rd", "é", "▁"]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes = token_bytes(tmp_path)
    assert sizes is not None
    assert sizes.tolist() == [0, *[1] * 256, 3, 2, 2, 1]


def test_what_tells_no_bytes(tmp_path: Path) -> None:
    assert token_bytes(tmp_path) is None
    for document in ({"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}, {"model": 3}, [1]):
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
        assert token_bytes(tmp_path) is None
    hostile = {"model": {"vocab": {"a": 1 << 60}}, "decoder": {"type": "ByteLevel"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(hostile))
    assert token_bytes(tmp_path) is None
