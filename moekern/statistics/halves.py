"""One half of the text as statistics of its own: of those fields that are kept by halves."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moekern.statistics.layer import HALVED, LayerStatistics

OF_WEIGHTS = frozenset(f.name for f in fields(LayerStatistics) if f.metadata["merge"] == "same")
NOT_KEPT = frozenset(f.name for f in fields(LayerStatistics)) - OF_WEIGHTS - {*HALVED}


class NotKept(Exception):
    """A field was asked for that halves of the text do not hold."""


class Half(LayerStatistics):
    """Sums over one half of the text. What is not kept by halves raises NotKept when it is looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name in NOT_KEPT:
            raise NotKept(name)
        return super().__getattribute__(name)


def halves_of(sums: LayerStatistics) -> tuple[Half, Half] | None:
    """Both halves of the text; None where they are not known (older files), or one of them saw no token."""
    if not sums.half_tokens.numel() or not sums.half_tokens.all():
        return None
    held = sums.tensors()
    even, odd = (Half(**held | {name: held[f"half_{name}"][i] for name in HALVED}) for i in (0, 1))
    return even, odd
