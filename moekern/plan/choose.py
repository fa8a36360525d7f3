"""The experts with the highest scores, and those that are kept whatever their score."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from moekern.errors import InputError

TIE = "lowest expert number"


def choose_top(
    scores: Sequence[float],
    kept: int,
    *,
    groups: int = 1,
    protected: Collection[int] = (),
    drop_first: Collection[int] = (),
    where: str = "plan",
) -> tuple[int, ...]:
    """The `kept` experts with the highest scores, as many from each group; ties go to the lowest number.

    Protected experts are kept whatever their score, and those in `drop_first` only where places are left. Raises
    InputError when a group has more protected experts than places.
    """
    check_protected(len(scores), kept, groups, protected, where)
    quota, size = kept // groups, len(scores) // groups
    chosen: list[int] = []
    for start in range(0, len(scores), size):
        ranked = sorted(range(start, start + size), key=lambda e: (e not in protected, e in drop_first, -scores[e], e))
        chosen += ranked[:quota]
    return tuple(sorted(chosen))


def tied(
    scores: Sequence[float],
    keep: Collection[int],
    *,
    groups: int = 1,
    protected: Collection[int] = (),
    drop_first: Collection[int] = (),
) -> int:
    """How many experts have the score at which `choose_top` ends, where it kept some of them and dropped others.

    Their numbers, and not their scores, decided; 0 where no score is on both sides.
    """
    size, found = len(scores) // groups, 0
    for start in range(0, len(scores), size):
        group = range(start, start + size)
        kept = [scores[e] for e in group if e in keep and e not in protected]
        dropped = [scores[e] for e in group if e not in keep and e not in drop_first]
        if kept and dropped and min(kept) in dropped:
            found += kept.count(min(kept)) + dropped.count(min(kept))
    return found


def check_protected(experts: int, kept: int, groups: int, protected: Collection[int], where: str) -> None:
    """Raise InputError when a group has more protected experts than places."""
    quota, size = kept // groups, experts // groups
    for group in range(groups):
        held = sorted(e for e in protected if e // size == group)
        if len(held) > quota:
            place = f"group {group} keeps" if groups > 1 else "it keeps"
            raise InputError(f"{where}: {len(held)} protected experts {held}, but {place} {quota}; keep more")


def super_experts(max_abs: Mapping[str, Sequence[float]]) -> dict[str, tuple[int, ...]]:
    """Experts with extreme outputs, by layer; layers without one are absent (arXiv:2507.23279, rule of REAP's code).

    `max_abs` holds each layer's max |y| [E], in layer order. Super: above both the 99.5th percentile over all layers'
    experts and a tenth of the largest, in the first 75 % of the layers.
    """
    values = np.concatenate([np.asarray(v, dtype=np.float64) for v in max_abs.values()])
    threshold = max(float(np.percentile(values, 99.5)), float(values.max()) / 10)
    early = list(max_abs)[: int(0.75 * len(max_abs))]
    found = {key: tuple(e for e, value in enumerate(max_abs[key]) if value > threshold) for key in early}
    return {key: experts for key, experts in found.items() if experts}
