"""Gradients add up in one order, whichever process has which segment."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch
from torch import Tensor

from moekern.data.batches import Batch, TokenData
from moekern.measurement.gradient_sums import SegmentSums, Shares, Totals
from moekern.team import ALONE, Team

E, SHAPE = 4, (3, 5)


class OneOf(Team):
    """A rank that runs before the first one, or the first one, which then finds what the others have sent."""

    def __init__(self, rank: int, size: int, sent: dict[int, deque[Any]], gathered: list[Any]) -> None:
        self.rank, self.size, self.sent, self.gathered = rank, size, sent, gathered

    def send(self, value: object) -> None:
        self.sent.setdefault(self.rank, deque()).append(copy.deepcopy(value))

    def receive(self, rank: int) -> Any:
        return self.sent[rank].popleft()

    def gather(self, value: Any) -> list[Any]:
        self.gathered.append(value)
        return self.gathered if self.first else []


def text() -> TokenData:
    """66 chunks of one domain in 32 segments, some of two chunks and some of three."""
    return TokenData((Batch("a", torch.ones(66, 2, dtype=torch.int64)),), {}, 1)


def gradient(chunk: int) -> list[Tensor | None]:
    seeded = torch.Generator().manual_seed(chunk)
    return [torch.randn(E, *SHAPE, generator=seeded), torch.randn(E, *SHAPE, generator=seeded) if chunk % 3 else None]


def added(ranks: int) -> tuple[list[Tensor], Tensor]:
    """G of two matrices, and the sums of gates."""
    sent, gathered = dict[int, deque[Any]](), list[Any]()
    zeros = lambda: [torch.zeros(E, *SHAPE) for _ in range(2)]  # noqa: E731
    for rank in reversed(range(ranks)):
        team = ALONE if ranks == 1 else OneOf(rank, ranks, sent, gathered)
        shares = Shares.of(text().by_chunk(), team)
        totals, gates = Totals(zeros(), zeros() if rank == 0 else []), SegmentSums(shares, E)
        totals.add(shares, gradient, lambda unit, G: None)
        for chunk in shares.own():
            gates.add(chunk, torch.randn(E, generator=torch.Generator().manual_seed(chunk)).double() / 3)
        found = gates.total()
    assert not any(sent.values())
    return totals.domain, found


def test_any_number_of_processes_gives_the_bits_of_one() -> None:
    want, gates = added(1)
    torch.testing.assert_close(want[0], sum((gradient(chunk)[0] for chunk in range(66)), torch.zeros(E, *SHAPE)))
    for ranks in (2, 3, 40):  # the last of these have no text
        got, own = added(ranks)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(own, gates)
