"""Text in units, which one process takes whole, and the chunks of an expert's rows in each: what decides the bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moekern.errors import InputError
from moekern.refit.rows import Room
from moekern.team import Team

ROWS = 1024  # of one expert and one unit, at most, that are computed together


@dataclass(frozen=True)
class Unit:
    """A range of this process's tokens, and the number of it among the units of all processes.

    Sums are taken of each unit, and added in the order of their numbers. An expert's rows of a unit are multiplied
    together, so a unit should have some hundred of each.
    """

    number: int
    start: int
    stop: int


class HasFeatures(Protocol):
    """Of the experts of a layer, what `Features` asks for; see `ridge.Experts`."""

    count: int
    width: int

    def tokens(self, expert: int) -> Tensor: ...

    def features(self, expert: int, tokens: Tensor) -> Tensor: ...


class Units:
    """The units of this process, which cover its N tokens, and which process has which."""

    def __init__(self, own: Sequence[Unit] | None, tokens: int, team: Team) -> None:
        """`own` None: all tokens are one unit. Raises InputError for units that overlap or leave tokens out."""
        self.team = team
        self.own = tuple([Unit(0, 0, tokens)] if own is None else own)
        ends = [0, *(unit.stop for unit in self.own)]
        numbers = [unit.number for unit in self.own]
        rising = all(unit.start == end and unit.stop >= end for unit, end in zip(self.own, ends, strict=False))
        if not rising or ends[-1] != tokens or sorted(set(numbers)) != numbers:
            raise InputError(f"units: expected ranges that follow one another up to {tokens}, got {self.own}")
        found = [(number, rank) for rank, theirs in enumerate(team.every(numbers)) for number in theirs]
        self.owners = tuple(sorted(found))
        if len(dict(found)) != len(found):
            raise InputError("units: two processes have one of the same number; number those of all processes")

    def summed(self, of: Callable[[int], list[Tensor] | None]) -> list[Tensor] | None:
        """At rank 0 the float64 sums over all units of what `of` (the place of a unit in `own`) gives, None where no
        unit has any; None at other ranks. Sums of a unit are float64."""
        if not self.team.first:
            for place in range(len(self.own)):
                sums = of(place)
                self.team.send(None if sums is None else [value.cpu() for value in sums])
            return None
        total: list[Tensor] | None = None
        places = iter(range(len(self.own)))
        for _, rank in self.owners:
            sums = of(next(places)) if rank == 0 else self.team.receive(rank)
            if sums is not None and total is None:
                total = [value.double() for value in sums]
            elif sums is not None and total is not None:
                for whole, value in zip(total, sums, strict=True):
                    whole += value.to(whole.device)
        return total


@dataclass(frozen=True)
class Chunk:
    """Rows of an expert in one unit that are computed together: all held back, or none."""

    number: int  # among the expert's
    tokens: Tensor  # int64, rising
    held: bool


class Features:
    """The experts' features by chunks. Where `room` has room they are computed once and kept, else computed anew."""

    def __init__(self, experts: HasFeatures, units: Units, held: Tensor, room: Room) -> None:
        self.experts = experts
        self.chunks = [_chunks(experts.tokens(e), units.own, held) for e in range(experts.count)]
        self.rows = [sum(len(c.tokens) for unit in cut for c in unit) for cut in self.chunks]
        self.computed = 0  # rows of features
        self.kept: dict[int, dict[int, Tensor]] = {}
        sizes = [4 * experts.width * rows for rows in self.rows]
        whole = room.take(sum(sizes))
        self.one = not whole and not room.take(max(sizes))  # not even of one expert
        self.lasting = frozenset(e for e, size in enumerate(sizes) if whole or (not self.one and room.take(size)))
        self.latest: int | None = None

    def fitted(self, expert: int, place: int) -> Iterator[tuple[Chunk, Tensor]]:
        """Of the unit at a place, the chunks whose rows are fitted, with their features [rows, m] float32."""
        return ((c, self._of(expert, c)) for c in self.chunks[expert][place] if not c.held)

    def all(self, expert: int) -> Iterator[tuple[Chunk, Tensor]]:
        """All chunks of this process, with their features [rows, m] float32."""
        return ((c, self._of(expert, c)) for unit in self.chunks[expert] for c in unit)

    @property
    def passes(self) -> float:
        """How often the features of all rows have been computed."""
        return self.computed / max(1, sum(self.rows))

    def _of(self, expert: int, chunk: Chunk) -> Tensor:
        kept = self.kept.setdefault(expert, {})
        if chunk.number in kept:
            return kept[chunk.number]
        value = self.experts.features(expert, chunk.tokens)
        self.computed += len(chunk.tokens)
        if value.device.type == "cpu" and not self.one:  # on a device it is soon computed, and its memory is another
            if expert not in self.lasting and self.latest != expert:
                if self.latest is not None:
                    del self.kept[self.latest]
                self.latest = expert
            kept[chunk.number] = value
        return value


def one_group(rows: Tensor) -> Tensor:
    """Offsets of rows that are all one expert's, as kernels take them."""
    return torch.tensor([0, len(rows)], device=rows.device)


def square(rows: Tensor) -> Tensor:
    """Of rows [n, C], at most ROWS, the sum of squares: float64, in one order for every number of threads."""
    return rows.double().square().sum(1).sum()


def _chunks(tokens: Tensor, units: Sequence[Unit], held: Tensor) -> list[list[Chunk]]:
    """An expert's rows (int64 rising) by units, at most ROWS together; of a unit those that are fitted come first."""
    tokens = tokens.cpu()
    ends = torch.searchsorted(tokens, torch.tensor([end for unit in units for end in (unit.start, unit.stop)]))
    found, number = list[list[Chunk]](), 0
    for start, stop in ends.view(-1, 2).tolist():
        rows, cut = tokens[start:stop], list[Chunk]()
        for back in (False, True):
            for part in rows[held[rows] == back].split(ROWS):
                if len(part):
                    cut.append(Chunk(number, part, back))
                    number += 1
        found.append(cut)
    return found
