"""Plans that replace what they drop, and the vectors that stand for it, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moekern.plan.document import LayerPlan, Plan
from moekern.plan.replacement import Replacement

EXPERTS = 8
KEEP = {"0": (0, 2, 7), "1": (4,)}  # another number in each layer, fewer than a token chooses in one


@dataclass(frozen=True)
class Vectors:
    """As pruning.constants.Vectors: random numbers."""

    size: int = 6
    replacement: Replacement = Replacement("mean", "0" * 64)
    unseen: Mapping[str, Sequence[int]] = field(default_factory=dict)
    scale: float = 1.0

    def of(self, layer: str) -> np.ndarray:
        return self.scale * np.random.default_rng(int(layer)).standard_normal((EXPERTS, self.size))

    def idle(self, layer: str) -> Sequence[int]:
        return self.unseen.get(layer, ())


def replacing(constants: str = "mean", keep: Mapping[str, Sequence[int]] = KEEP, statistics: str | None = None) -> Plan:
    """A plan that replaces all other experts."""
    return Plan({key: LayerPlan(tuple(kept)) for key, kept in keep.items()}, {}, Replacement(constants, statistics))


def bfloat16(values: np.ndarray) -> bytes:
    """The nearest bfloat16, ties to even, number by number."""
    out = b""
    for value in values.astype(np.float32):
        bits = int(np.float32(value).view(np.uint32))
        low, high = bits & 0xFFFF, bits >> 16
        high += low > 0x8000 or (low == 0x8000 and high & 1 == 1)
        out += high.to_bytes(2, "little")
    return out
