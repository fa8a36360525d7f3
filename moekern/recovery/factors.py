"""Matrices of experts as L R + S: a product of low rank, and rows that it does not make, of which few stay.

The second stage of MC-SMoE (arXiv:2310.01334), after LoSparse (arXiv:2306.11222). L R begins as the largest singular
values of W, their roots on either side, and S as what is left, W - L R; all three train. S loses whole rows, those of
the least importance in all matrices together: the mean over a row of |w dL/dw|, an exponential moving average over the
steps (PLATON, arXiv:2206.12562, with its uncertainty left out, as in MC-SMoE's code). A row that is gone may come back
as long as rows go, since it trains on. Before there is a gradient, rows count by their mean |w|.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from moekern.recovery.forms import Values

LEFT, RIGHT, SPARSE = "left", "right", "sparse"
BETA = 0.85  # of the moving average
WARM, END = 0.02, 0.08  # shares of the steps, first and last, in which none and all rows go that are to go


@dataclass(frozen=True)
class Factored:
    """left [..., out, rank] right [..., rank, in] + sparse [..., out, in]. turned: the parameter is [..., in, out]."""

    rank: int
    turned: bool = False
    based: ClassVar[bool] = False

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        *stack, out, width = (*shape[:-2], shape[-1], shape[-2]) if self.turned else shape
        parts = {LEFT: (out, self.rank), RIGHT: (self.rank, width), SPARSE: (out, width)}
        return {part: (*stack, *own) for part, own in parts.items()}

    def begun(self, base: Tensor, seed: int) -> dict[str, Tensor]:
        values = {part: torch.empty(shape) for part, shape in self.shapes(base.shape).items()}
        for W, left, right, sparse in zip(*(_stack(v) for v in (self._turned(base), *values.values())), strict=True):
            U, s, V = torch.linalg.svd(W.double(), full_matrices=False)
            root = s[: self.rank].sqrt()
            left.copy_(U[:, : self.rank] * root)
            right.copy_(root[:, None] * V[: self.rank])
            sparse.copy_(W - (left @ right).to(W.device))
        return values

    def made(self, base: Tensor, values: Values) -> Tensor:
        left, right, sparse = (values[part].to(base.device) for part in (LEFT, RIGHT, SPARSE))
        return self._turned(left @ right + sparse).contiguous()

    def gradients(self, base: Tensor, values: Values, G: Tensor) -> dict[str, Tensor]:
        own, (left, right) = self._turned(G), (values[part].to(G.device) for part in (LEFT, RIGHT))
        return {LEFT: own @ right.mT, RIGHT: left.mT @ own, SPARSE: own}

    def rest(self, values: Values) -> Tensor:
        """The parameter without its product."""
        return self._turned(values[SPARSE]).contiguous()

    def product(self, values: Values) -> tuple[Tensor, Tensor]:
        """Two factors, whose product is what the parameter is more than that."""
        return (values[RIGHT].mT, values[LEFT].mT) if self.turned else (values[LEFT], values[RIGHT])

    def _turned(self, value: Tensor) -> Tensor:
        return value.mT if self.turned else value


def _stack(value: Tensor) -> Tensor:
    """Of a matrix, or of a stack of them, as a stack."""
    return value.reshape(-1, *value.shape[-2:])


def rank_of(rows: int, columns: int, ratio: float) -> int:
    """The rank whose factors hold the share `ratio` of the numbers of a matrix, rounded up."""
    return ceil(ratio * rows * columns / (rows + columns))


def share_at(step: int, steps: int, final: float) -> float:
    """Which share of all rows stays behind a step, counted from 1, of so many: 1 at first, `final` in the last ones,
    and a cubic curve between."""
    warm, end = max(1, round(WARM * steps)), max(1, round(END * steps))
    if step > steps - end:
        return final
    if step <= warm:
        return 1.0
    left = 1 - (step - warm) / (steps - warm - end)
    return final + (1 - final) * left**3


def least_kept(importance: Sequence[Tensor], columns: Sequence[int], share: float) -> float:
    """The importance that a row must have to stay, where `importance` are those of all matrices' rows, of so many
    numbers each: that of the number of rank n (1 - share), rounded down, of all n numbers, from the least on."""
    values = torch.cat([each.flatten() for each in importance])
    sizes = torch.cat([torch.full((each.numel(),), width) for each, width in zip(importance, columns, strict=True)])
    order = values.argsort()
    rank = int(int(sizes.sum()) * (1 - share))
    if rank < 1:
        return float("-inf")
    place = int(torch.searchsorted(sizes[order].cumsum(0), rank))
    return float(values[order][place])


@dataclass
class Rows:
    """Which rows of sparse parts stay. sparse: name -> live values [..., out, in]; importance: name -> [..., out], kept
    with the state; final: the share of all rows that stays in the end."""

    sparse: Mapping[str, Tensor]
    importance: Mapping[str, Tensor]
    final: float

    def seen(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the importance of a step to the average."""
        for name, value in self.sparse.items():
            average = self.importance[name].view(-1, value.shape[-2])
            for own, one, G in zip(average, _stack(value), _stack(gradients[name]), strict=True):
                own.mul_(BETA).add_((one * G).abs().mean(-1), alpha=1 - BETA)

    def drop(self, share: float) -> None:
        """Let rows be zeros but for those that stay."""
        if share < 1:
            for name, stays in self.staying(share).items():
                self.sparse[name].mul_(stays[..., None])

    def staying(self, share: float | None = None) -> dict[str, Tensor]:
        """name -> bool [..., out]; share: None for the final one."""
        known = any(bool(value.any()) for value in self.importance.values())
        found = {n: self.importance[n] if known else self.sparse[n].abs().mean(-1) for n in self.sparse}
        widths = [value.shape[-1] for value in self.sparse.values()]
        least = least_kept(list(found.values()), widths, self.final if share is None else share)
        return {name: value >= least for name, value in found.items()}
