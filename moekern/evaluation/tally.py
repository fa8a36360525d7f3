"""Sums that come out alike in whatever order, by whatever processes and in however many passes they are added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ldexp
from typing import Any

import torch
from torch import Tensor

BITS = 64  # behind the point
Key = tuple[int, int, str, str]  # first batch of the pass, number of the plan, domain, what is summed


class Tally:
    """Numbers by key, each in fixed point: whole multiples of 2^-64 are added without rounding."""

    def __init__(self, sums: dict[Key, list[int]] | None = None) -> None:
        self.sums = {} if sums is None else sums

    def add(self, key: Key, values: Tensor) -> None:
        """values: finite, of one size for a key."""
        self._add(key, [int(ldexp(value, BITS)) for value in values.double().flatten().tolist()])

    def _add(self, key: Key, values: list[int]) -> None:
        held = self.sums.get(key)
        self.sums[key] = values if held is None else [a + b for a, b in zip(held, values, strict=True)]

    def forget(self, part: int) -> None:
        """What the pass has found whose first batch that is."""
        self.sums = {key: held for key, held in self.sums.items() if key[0] != part}

    @staticmethod
    def of_all(parts: Iterable[Tally]) -> Tally:
        """Of several processes."""
        whole = Tally()
        for part in parts:
            for key, held in part.sums.items():
                whole._add(key, held)
        return whole

    def totals(self) -> Iterator[tuple[int, str, str, Tensor]]:
        """Of all passes: plan, domain, what is summed, and the sums, float64."""
        found: dict[tuple[int, str, str], list[int]] = {}
        for (_, number, domain, what), held in self.sums.items():
            key = number, domain, what
            found[key] = held if key not in found else [a + b for a, b in zip(found[key], held, strict=True)]
        for (number, domain, what), held in found.items():
            yield number, domain, what, torch.tensor([ldexp(n, -BITS) for n in held], dtype=torch.float64)

    def document(self) -> list[Any]:
        """As JSON."""
        return [[*key, held] for key, held in self.sums.items()]

    @staticmethod
    def read(document: Any) -> Tally:
        """The inverse. Raises ValueError or TypeError for anything else."""
        found: dict[Key, list[int]] = {}
        for part, number, domain, what, held in document:
            found[int(part), int(number), str(domain), str(what)] = [int(n) for n in held]
        return Tally(found)
