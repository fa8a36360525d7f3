"""How many experts, and how wide, at the same bytes."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from moekern.errors import InputError
from moekern.router import Router, count_problem

AUTO = "auto"
TRIED = (1.0, 0.875, 0.75, 0.625, 0.5)  # widths over I; and the width at which all experts stay


@dataclass(frozen=True, order=True)
class Shape:
    """`experts` of `width` channels in each layer."""

    experts: int
    width: int

    def __str__(self) -> str:
        return f"{self.experts}x{self.width}"


def parse_shape(text: str) -> Shape | None:
    """The shape that a text such as "21x48" names; None for "auto". Raises InputError."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if found is None and text != AUTO:
        raise InputError(f"--shape {text}: expected auto, or experts x channels such as 64x512")
    return None if found is None else Shape(int(found[1]), int(found[2]))


def candidates(router: Router, width: int, share: float, allowed: Collection[int]) -> list[Shape]:
    """Shapes of at most `share` of the bytes of all experts, of `width` I: from few and whole to many and narrow.

    `allowed` are the widths that there may be, as `targets.widths_for` has them.
    """
    E, found = router.num_experts, list[Shape]()
    for part in (*TRIED, share):
        wanted = int(part * width + 1e-9)
        narrow = max((m for m in allowed if m <= wanted), default=None)
        if narrow is None:
            continue
        most = min(E, int(share * E * width / narrow + 1e-9))
        count = most // router.n_group * router.n_group
        if count and count_problem(count, router) is None and Shape(count, narrow) not in found:
            found.append(Shape(count, narrow))
    return sorted(found)
