"""How two numbers of one field become one, by the name that the field gives it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def merge_rows(a: Tensor, b: Tensor) -> Tensor:
    """Rows whose last number counts the others: equal ones are united, in rising order."""
    rows = torch.cat([part for part in (a, b) if part.numel()]) if a.numel() or b.numel() else a
    if not rows.numel():
        return rows
    keys, index = rows[:, :-1].unique(dim=0, return_inverse=True)
    counts = rows.new_zeros(len(keys)).index_add_(0, index, rows[:, -1])
    return torch.cat([keys, counts[:, None]], 1)


IN_PLACE = ("add", "max", "or")
MERGES: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "max": torch.maximum,
    "or": torch.bitwise_or,
    "same": lambda a, b: a if a.numel() else b,
    "alike": lambda a, b: a if torch.equal(a, b) else torch.zeros_like(a if a.numel() else b),
    "rows": merge_rows,
    # Halves, and others, that one side does not know are not known of both.
    "halves": lambda a, b: a + b if a.numel() and b.numel() else a[:0],
    "half maxima": lambda a, b: torch.maximum(a, b) if a.numel() and b.numel() else a[:0],
}
ONE_SIDED = ("same", "alike", "halves", "half maxima")  # may be measured on one side only
UNKNOWN = ("halves", "half maxima")  # and are then not known of both
