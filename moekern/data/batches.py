"""Token ids as batches of sequences, and the recipe they were made by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

DEFAULT_DOMAIN = "text"


@dataclass(frozen=True)
class Batch:
    """Sequences of one domain and one length, without padding."""

    domain: str
    input_ids: Tensor  # [B, S] int64

    def __repr__(self) -> str:
        return f"Batch({self.domain}, {tuple(self.input_ids.shape)})"


@dataclass(frozen=True)
class TokenData:
    """Batches and the recipe they were made by (any JSON: sources with their sha256, sequence length, seed)."""

    batches: tuple[Batch, ...]
    recipe: dict[str, Any]

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens per domain."""
        totals: dict[str, int] = {}
        for batch in self.batches:
            totals[batch.domain] = totals.get(batch.domain, 0) + batch.input_ids.numel()
        return totals


def sequences_of(ids: np.ndarray, length: int, budget: int | None, rng: np.random.Generator) -> list[np.ndarray]:
    """Pieces of `length` in a random order, up to `budget` tokens in all; only the last may be shorter."""
    whole = len(ids) // length
    pieces = [ids[i * length : (i + 1) * length] for i in rng.permutation(whole)]
    if len(ids) - whole * length >= 2:
        pieces.append(ids[whole * length :])
    out: list[np.ndarray] = []
    left = len(ids) if budget is None else budget
    for piece in pieces:
        piece = piece[:left]
        if len(piece) < 2:
            break
        out.append(piece)
        left -= len(piece)
    return out


def batched(sequences: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    group: list[np.ndarray] = []
    for sequence in sequences:
        if group and (len(group) == size or len(group[0]) != len(sequence)):
            yield np.stack(group)
            group = []
        group.append(sequence)
    if group:
        yield np.stack(group)
