"""Token ids as batches of sequences, and the recipe they were made by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekern.data.mixes import DEFAULT_DOMAIN as DEFAULT_DOMAIN
from moekern.errors import InputError, check_type

CHUNK_TOKENS = 2048  # of the sequences that are computed together, where nobody says how many
SEGMENTS = 32  # of a domain, at most: sums of each are added up apart, and decide the bits of the whole


@dataclass(frozen=True)
class Batch:
    """Sequences of one domain and one length: nothing is ever padded.

    Where `answers` are marked, training counts the loss of these tokens alone; all else takes every token alike.
    Raises TypeError for values of other types, InputError for ids of another shape, on a device, or below 0.
    """

    domain: str
    input_ids: Tensor  # [B, S] int64, on the CPU
    answers: Tensor | None = None  # bool [B, S]; None: every token is one

    def __post_init__(self) -> None:
        check_type("domain", self.domain, str)
        check_type("input_ids", self.input_ids, Tensor)
        ids = self.input_ids
        if ids.ndim != 2 or ids.dtype != torch.int64 or ids.device.type != "cpu":
            found = f"{ids.dtype} {list(ids.shape)} on {ids.device}"
            raise InputError(f"Batch of {self.domain}: input_ids: expected int64 [B, S] on the CPU, got {found}")
        if ids.numel() and int(ids.min()) < 0:
            raise InputError(f"Batch of {self.domain}: input_ids: {int(ids.min())} is no token id")
        marks = self.answers
        if marks is not None and (marks.dtype != torch.bool or marks.shape != ids.shape or marks.device != ids.device):
            found = f"{marks.dtype} {list(marks.shape)} on {marks.device}"
            wanted = f"expected bool {list(ids.shape)} on the CPU"
            raise InputError(f"Batch of {self.domain}: answers: {wanted}, got {found}")

    def part(self, rows: slice) -> Batch:
        """Some of its sequences."""
        return Batch(self.domain, self.input_ids[rows], None if self.answers is None else self.answers[rows])

    def each(self) -> Iterator[Batch]:
        """Its sequences, one by one."""
        return (self.part(slice(n, n + 1)) for n in range(len(self.input_ids)))

    @property
    def counted(self) -> Tensor | None:
        """bool [B (S - 1)]: which of the tokens that are predicted a loss counts; None: all."""
        return None if self.answers is None else self.answers[:, 1:].flatten()

    @property
    def predicted(self) -> int:
        """How many these are."""
        counted = self.counted
        return self.input_ids[:, 1:].numel() if counted is None else int(counted.sum())

    @staticmethod
    def joined(batches: Sequence[Batch]) -> Batch:
        """One of several of one domain, one length and one kind."""
        marks = [batch.answers for batch in batches if batch.answers is not None]
        ids = torch.cat([batch.input_ids for batch in batches])
        return Batch(batches[0].domain, ids, torch.cat(marks) if marks else None)

    def __repr__(self) -> str:
        return f"Batch({self.domain}, {tuple(self.input_ids.shape)})"


@dataclass(frozen=True)
class TokenData:
    """Batches and the recipe they were made by (any JSON: sources with the sha256 of their token ids, sequence length,
    chunk, seed); notes: what was said of the text, and of what of it was left out.

    Statistics are computed, and added, `chunk` sequences at a time, in their order and by `segments`: this decides
    their bits, and batches do not.
    """

    batches: tuple[Batch, ...]
    recipe: dict[str, Any]
    chunk: int = 1
    notes: tuple[str, ...] = ()

    def by_chunk(self) -> TokenData:
        """The same sequences in the same order, `chunk` of a domain and a length together, whatever the batches are."""
        chunks: list[Batch] = []
        for domain in self.tokens:
            rows = (row for batch in self.batches if batch.domain == domain for row in batch.each())
            for _, alike in groupby(rows, lambda row: (row.input_ids.shape[1], row.answers is None)):
                some = list(alike)
                chunks += [Batch.joined(some[n : n + self.chunk]) for n in range(0, len(some), self.chunk)]
        return replace(self, batches=tuple(chunks))

    @property
    def segments(self) -> tuple[int, ...]:
        """The segment of its domain that each batch belongs to, where batches are chunks; see `segment_of`."""
        total = Counter(batch.domain for batch in self.batches)
        seen: Counter[str] = Counter()
        found = []
        for batch in self.batches:
            found.append(segment_of(seen[batch.domain], total[batch.domain]))
            seen[batch.domain] += 1
        return tuple(found)

    def units(self) -> list[Segment]:
        """All segments of the text, where batches are chunks: domain by domain, and in their order."""
        found: dict[tuple[str, int], list[int]] = {}
        for number, (batch, segment) in enumerate(zip(self.batches, self.segments, strict=True)):
            found.setdefault((batch.domain, segment), []).append(number)
        size = [batch.input_ids.numel() for batch in self.batches]
        return [Segment(d, n, tuple(chunks), sum(size[c] for c in chunks)) for (d, n), chunks in found.items()]

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens per domain."""
        totals: dict[str, int] = {}
        for batch in self.batches:
            totals[batch.domain] = totals.get(batch.domain, 0) + batch.input_ids.numel()
        return totals


@dataclass(frozen=True)
class Segment:
    """Chunks of a domain that add up by themselves, and that one process takes whole."""

    domain: str
    number: int
    chunks: tuple[int, ...]  # numbers of batches
    tokens: int


def dealt(sizes: Sequence[int], ranks: int) -> list[int]:
    """For each piece of work of so many tokens the rank that does it: the largest first, each to the rank with the
    least so far. Rank 0 has some where any has."""
    owners, load = [0] * len(sizes), [0] * ranks
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        owners[piece] = load.index(min(load))
        load[owners[piece]] += sizes[piece]
    return owners


def loads(sizes: Sequence[int], ranks: int) -> list[int]:
    """Tokens of each rank, where pieces of work of so many are dealt."""
    found = [0] * ranks
    for size, owner in zip(sizes, dealt(sizes, ranks), strict=True):
        found[owner] += size
    return found


def segment_of(chunk: int, chunks: int) -> int:
    """The segment of a domain that its chunk belongs to: min(SEGMENTS, chunks) of them, of about as many chunks each.

    Sums of a segment are added up in order of its chunks, then those of the segments as `statistics.folding` has it.
    Where each process takes whole segments, the bits do not depend on how many processes there are.
    """
    return chunk * min(SEGMENTS, chunks) // chunks


def sequences_of(ids: np.ndarray, length: int, budget: int | None, rng: np.random.Generator) -> list[np.ndarray]:
    """Pieces of `length` in a random order, up to `budget` tokens in all; only the last may be shorter."""
    whole = len(ids) // length
    pieces = [ids[i * length : (i + 1) * length] for i in rng.permutation(whole)]
    if len(ids) - whole * length >= 2:
        pieces.append(ids[whole * length :])
    return _within(pieces, budget)


def rows_of(
    documents: Iterable[np.ndarray],
    length: int | None,
    budget: int | None,
    rng: np.random.Generator,
    most: int | None = None,
) -> list[np.ndarray]:
    """The first `length` tokens (None: all) of each document, drawn in a random order up to `budget` tokens and `most`
    rows.

    Rows of one length follow one another, so that they can be computed together without padding. A document of less
    than 2 tokens is left out.
    """
    rows = [document[:length] for document in documents if len(document) > 1]
    drawn = _within([rows[i] for i in rng.permutation(len(rows))[:most]], budget)
    return sorted(drawn, key=len, reverse=True)


def _within(pieces: Iterable[np.ndarray], budget: int | None) -> list[np.ndarray]:
    """The first of the pieces, up to `budget` tokens in all; the last is cut, to 2 tokens at least."""
    out: list[np.ndarray] = []
    for piece in pieces:
        piece = piece[:budget]
        if len(piece) < 2:
            break
        out.append(piece)
        budget = None if budget is None else budget - len(piece)
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
