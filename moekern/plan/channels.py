"""Which channels of an expert stay, as text: a digit for four channels, the lowest first and its bit the highest."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

WIDTH_CAP = 1 << 20  # channels of an expert
_TEXT = re.compile(r"[0-9a-f]+")


def channel_text(channels: np.ndarray, width: int) -> str:
    """The text of channels, int64 from 0 to width - 1; without digits that hold none at its end."""
    bits = np.zeros(-(-width // 8) * 8, np.uint8)
    bits[channels] = 1
    return np.packbits(bits).tobytes().hex().rstrip("0")


def channel_ids(text: str) -> np.ndarray:
    """The channels of a text, int64 and rising. Raises ValueError for what is none."""
    if not _TEXT.fullmatch(text) or 4 * len(text) > WIDTH_CAP:
        raise ValueError(f"expected hexadecimal digits, one for four channels, up to {WIDTH_CAP // 4} of them")
    packed = bytes.fromhex(text + "0" * (len(text) % 2))
    return np.flatnonzero(np.unpackbits(np.frombuffer(packed, np.uint8))).astype(np.int64)


def channel_rows(texts: Sequence[str]) -> np.ndarray:
    """The channels of several experts that have as many, int64 [n, M]."""
    return np.stack([channel_ids(text) for text in texts])


def channel_count(text: str) -> int:
    """How many channels a text names."""
    return int.from_bytes(bytes.fromhex(text + "0" * (len(text) % 2)), "big").bit_count()
