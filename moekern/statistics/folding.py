"""The order in which segments of the text add up, so that any number of processes gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moekern.statistics.layer import HALVED, LayerStatistics


@dataclass
class Folding:
    """The sums of one layer and domain: segments of even number in order, those of odd number in order, then both.

    What is added is taken over: it must not be used any longer.
    """

    halves: list[LayerStatistics | None] = field(default_factory=lambda: [None, None])
    last: int = -1  # the segment that was added last

    def add(self, segment: int, sums: LayerStatistics) -> None:
        """The sums of the next segment that holds text. Raises RuntimeError for one that comes out of order."""
        if segment <= self.last:
            raise RuntimeError(f"segment {segment} came after segment {self.last}; the sums would have other bits")
        self.last = segment
        half = self.halves[segment % 2]
        self.halves[segment % 2] = sums if half is None else half.absorb(sums)

    def total(self) -> LayerStatistics:
        """Both halves together, and of each what is kept apart; nothing can be added any longer."""
        even, odd = self.halves
        assert even is not None, "no domain is without a segment 0"
        other = even.like() if odd is None else odd
        apart = {f"half_{name}": torch.stack([getattr(half, name) for half in (even, other)]) for name in HALVED}
        return replace(even if odd is None else even.absorb(odd), **apart)


def folded(sums: Mapping[int, Tensor]) -> Tensor:
    """One tensor of each segment, float64, by the segments' numbers: added up in the same order; 0 of none."""
    zero = torch.zeros((), dtype=torch.float64)
    even, odd = (sum((sums[number] for number in sorted(sums) if number % 2 == half), zero) for half in (0, 1))
    return even + odd
