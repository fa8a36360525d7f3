"""Logits of one model, kept until those of another come, and what both are to each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt

from torch import Tensor

from moekern.model.states import State, States

ROWS = 64  # tokens whose logits are kept, and compared, together


@dataclass(frozen=True)
class Compared:
    """Of the logits of some tokens: the largest difference, how many tokens have the same likeliest next one, and how
    many of the first model's logits are finite, with their sum and that of their squares in float64."""

    difference: float
    agreed: int
    tokens: int
    finite: int
    total: float
    squares: float

    @staticmethod
    def of(one: Tensor, other: Tensor) -> Compared:
        """Of logits [n, V], float32."""
        difference = (one - other).masked_fill_(one == other, 0).abs().max()  # where both are -inf too
        agreed, finite = int((one.argmax(-1) == other.argmax(-1)).sum()), one[one.isfinite()].double()
        return Compared(
            float(difference), agreed, len(one), len(finite), float(finite.sum()), float(finite.square().sum())
        )

    @staticmethod
    def joined(some: Iterable[Compared]) -> Compared:
        """Of all their tokens."""
        every = list(some)
        sums = (sum(values) for values in zip(*(vars(each).values() for each in every), strict=True))
        _, agreed, tokens, finite, total, squares = sums
        return Compared(max(each.difference for each in every), agreed, tokens, finite, total, squares)

    @property
    def std(self) -> float:
        """Standard deviation of the first model's logits."""
        return sqrt(max(0.0, self.squares - self.total**2 / max(1, self.finite)) / max(1, self.finite - 1))


@dataclass
class HeldLogits:
    """The first model's logits of some batches, in `states`: in memory as far as these may be, else in a file.
    `found`: of each batch, what the second model's are to them."""

    states: States
    found: dict[int, Compared] = field(default_factory=dict)

    def keep(self, place: int, logits: Tensor) -> None:
        """The first model's of a batch [B, S, V], again where its pass begins again."""
        for number, rows in enumerate(logits.flatten(0, -2).split(ROWS)):
            name = place, number
            if name in self.states.there:
                self.states.take(name)
            self.states.put(name, State(rows, {}))

    def compare(self, place: int, logits: Tensor) -> None:
        """The second model's."""
        pieces = enumerate(logits.flatten(0, -2).split(ROWS))
        self.found[place] = Compared.joined(
            Compared.of(self.states.look((place, number)).hidden.float(), rows.cpu().float()) for number, rows in pieces
        )
