"""How many bytes of text each token stands for, as tokenizer.json tells it. Nothing of the tokenizer is run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern.checkpoint.strict_json import read_json
from moekern.errors import InputError

TOKENIZER = "tokenizer.json"
KINDS = {"ByteLevel", "ByteFallback", "Metaspace"}  # decoders whose tokens are known
MOST = 1 << 24  # ids
SPACE = "\u2581"  # as SentencePiece writes it


def token_bytes(folder: Path) -> Tensor | None:
    """int64 [ids]: UTF-8 bytes of each token, 0 of special ones, which are no text, and of ids that are none.

    A token of a byte-level vocabulary has a character for each byte, a SentencePiece one is text with U+2581 for a
    space, or a byte by its number. None where the file is not there, or its decoder is of neither kind.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    try:
        document = read_json(path)
        kinds = {str(decoder.get("type")) for decoder in _decoders(document.get("decoder"))}
        vocabulary = document["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else _numbered(vocabulary)
        sizes = {int(i): len(text) if "ByteLevel" in kinds else _of_piece(text) for text, i in pairs}
        for added in document.get("added_tokens") or ():
            sizes[int(added["id"])] = 0 if added["special"] else len(added["content"].encode())
    except (InputError, ValueError, TypeError, LookupError, AttributeError):
        return None
    if not kinds & KINDS or not sizes or min(sizes) < 0 or max(sizes) >= MOST:
        return None
    found = torch.zeros(max(sizes) + 1, dtype=torch.int64)
    found[list(sizes)] = torch.tensor(list(sizes.values()))
    return found


def _decoders(decoder: Any) -> Iterator[dict[str, Any]]:
    """A decoder, or those that it is a sequence of."""
    if isinstance(decoder, dict):
        yield decoder
        yield from decoder.get("decoders") or ()


def _numbered(pieces: list[list[Any]]) -> Iterator[tuple[str, int]]:
    return ((piece[0], i) for i, piece in enumerate(pieces))


def _of_piece(text: str) -> int:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return 1
    return len(text.replace(SPACE, " ").encode())
