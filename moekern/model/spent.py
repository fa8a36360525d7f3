"""What a run spent its time on: waiting for the disk, filling layers, and computing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

WORDS = {"disk": "the disk", "loading": "conversion and transfer of weights", "compute": "computing"}


@dataclass
class Spent:
    """Seconds since it was made, and those of them in which nothing was computed."""

    begun: float = field(default_factory=time.monotonic)
    disk: float = 0  # waiting for bytes that were not there yet
    loading: float = 0  # making layers of them, on the device

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time in the context is spent waiting for the disk."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.disk += time.monotonic() - start

    @contextmanager
    def filling(self) -> Iterator[None]:
        """The time in the context is spent converting weights and bringing them to the device."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.loading += time.monotonic() - start

    @property
    def shares(self) -> dict[str, float]:
        """Of the whole, each of WORDS; what is neither of the first two is computing."""
        total = max(time.monotonic() - self.begun, self.disk + self.loading, 1e-9)
        shares = {"disk": self.disk / total, "loading": self.loading / total}
        return {**shares, "compute": 1 - sum(shares.values())}

    @property
    def described(self) -> str:
        """For people, what took the most first."""
        shares = sorted(self.shares.items(), key=lambda each: -each[1])
        return f"bound by {WORDS[shares[0][0]]}: " + ", ".join(f"{share:.0%} {WORDS[name]}" for name, share in shares)
