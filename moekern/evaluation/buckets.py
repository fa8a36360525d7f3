"""Figures of predicted tokens by where they stand in their sequence, and by how sure the original is of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moekern.evaluation.losses import METRICS, ratio_error
from moekern.evaluation.predictions import ENTROPY

POSITIONS = tuple(2**n for n in range(24))  # first position of each bucket; the second token of a sequence is at 1
ENTROPIES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # nats, the least of each bucket
AXES: Mapping[str, tuple[float, ...]] = {"position": POSITIONS, "entropy": ENTROPIES}
FIGURES = (*METRICS, "one_minus_tv")


def bucket_sums(figures: Tensor) -> dict[str, Tensor]:
    """Axis -> float64 [4, buckets, 5], sums over sequences that add up: of x, the sums of `FIGURES` over a sequence's
    tokens in the bucket and their number n; of x^2, of x n, and of 1 where n is not 0. figures [B, S, 5] are those of
    `token_figures`."""
    B, S, _ = figures.shape
    place = torch.arange(1, S + 1, dtype=torch.float64).expand(B, S)
    of = {"position": place, "entropy": figures[..., ENTROPY]}
    return {axis: _moments(figures, of[axis].contiguous(), starts) for axis, starts in AXES.items()}


def _moments(figures: Tensor, values: Tensor, starts: tuple[float, ...]) -> Tensor:
    B, S, _ = figures.shape
    edges = torch.tensor(starts[1:], dtype=torch.float64)
    bucket = torch.bucketize(values, edges, right=True) + torch.arange(B)[:, None] * len(starts)
    rows = torch.cat([figures[..., :ENTROPY], torch.ones(B, S, 1, dtype=torch.float64)], -1)
    x = torch.zeros(B * len(starts), 5, dtype=torch.float64).index_add_(0, bucket.flatten(), rows.flatten(0, 1))
    x = x.view(B, len(starts), 5)
    n = x[..., 4:]
    return torch.stack([x, x * x, x * n, (n > 0).double().expand_as(x)]).sum(1)


def bucket_rows(axis: str, sums: Tensor) -> list[dict[str, Any]]:
    """A row for each bucket that has tokens: `from`, `to` (the last position, or the entropy below which it is; None:
    the last bucket), means of `FIGURES` with standard errors by sequence, tokens and sequences."""
    starts = AXES[axis]
    x, squares, products, there = sums.view(4, len(starts), 5)
    rows = []
    for i, start in enumerate(starts):
        tokens, sequences = float(x[i, 4]), int(there[i, 4])
        if not tokens:
            continue
        end = starts[i + 1] if i + 1 < len(starts) else None
        row: dict[str, Any] = {"from": start, "to": end - 1 if end is not None and axis == "position" else end}
        for c, name in enumerate(FIGURES):
            mean = float(x[i, c]) / tokens
            left = squares[i, c] - 2 * mean * products[i, c] + mean**2 * squares[i, 4]
            row[name], row[f"{name}_error"] = mean, ratio_error(float(left), sequences, tokens)
        rows.append(row | {"tokens": int(tokens), "sequences": sequences})
    return rows
