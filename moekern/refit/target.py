"""What a layer should make of a text, and how what its experts put out enters that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekern.refit.rows import RowStore
from moekern.refit.units import ROWS, Units

EXACT = 1e-3  # of what experts add, what may be missing where it is added as it is, or times a number
NOISE = 4  # roundings of a hidden state
MOST = 0.2  # beyond which roundings hide too much


@dataclass(frozen=True)
class Target:
    """`wanted` float32 [N, H]: with a `scale` c the hidden states that the original's layer makes, of which c times
    what experts put out is a part; without, what the original's experts put out."""

    wanted: RowStore
    scale: float | None
    squares: Tensor  # float64 [2]: of all processes' rows of it that are fitted, and that are held back

    @property
    def size(self) -> int:
        return self.wanted.tensor.shape[1]

    def relative(self, squares: float, *, held: bool) -> float | None:
        """The root of summed squares of what lacks over that of what is wanted; None where there are no such rows."""
        whole = float(self.squares[int(held)])
        return (self.scale or 1.0) * (squares / whole) ** 0.5 if whole else None


def scale_of(added: Tensor, put_out: Tensor, hidden: Tensor) -> float | None:
    """The number c with added = c x put_out, where there is one: what experts [T, H] add to `hidden` [..., H].

    None where something else lies behind the experts: a norm, or a projection out of a latent space.
    """
    if added.numel() != put_out.numel():
        return None
    more, y = added.double().flatten(), put_out.double().flatten()
    length, energy = float(more.norm()), float(y @ y)
    if not energy or not length:
        return None
    scale = float(more @ y) / energy
    noise = NOISE * torch.finfo(hidden.dtype).eps * float(hidden.double().norm()) / length
    missing = float((more - scale * y).norm()) / length
    if missing > min(MOST, EXACT + noise):
        return None
    return 1.0 if abs(scale - 1) <= EXACT + noise else scale


def squares_of(rows: RowStore, held: Tensor, parts: Units) -> Tensor:
    """Float64 [2], at every rank: the sums of squares of rows that are fitted, and that are held back."""

    def of_unit(place: int) -> list[Tensor]:
        total = torch.zeros(2, dtype=torch.float64)
        unit = parts.own[place]
        for start in range(unit.start, unit.stop, ROWS):
            some = slice(start, min(start + ROWS, unit.stop))
            squares = rows[some].double().square().sum(1).cpu()
            total[0] += squares[~held[some]].sum()
            total[1] += squares[held[some]].sum()
        return [total]

    sums = parts.summed(of_unit)
    return parts.team.broadcast(torch.zeros(2, dtype=torch.float64) if sums is None else sums[0])
