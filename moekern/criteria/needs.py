"""What scores of all kinds share: a tier that must have been measured, and where idle experts stand."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.errors import InputError
from moekern.statistics.layer import LayerStatistics


class NotForLayer(InputError):
    """A criterion says nothing about a layer of this kind; whoever knows which one it is puts that before."""


def need(statistics: LayerStatistics, criterion: str, *names: str) -> None:
    """Raise InputError, naming the tier, when one of these fields was not measured."""
    for name in names:
        if not getattr(statistics, name).numel():
            tier = LayerStatistics.__dataclass_fields__[name].metadata["tier"]
            raise InputError(
                f"{criterion}: the statistics hold no {name}; "
                + ("calibrate again" if tier == "routed" else f"calibrate with --tier {tier}")
            )


def idle_lowest(statistics: LayerStatistics, scores: Tensor) -> Tensor:
    """`scores` [E] with every idle expert (count 0) at one finite value, at least 1 below zero and all the others."""
    return lowest_but(statistics.count > 0, scores)


def lowest_but(used: Tensor, scores: Tensor) -> Tensor:
    """As `idle_lowest`, where `used` [E] bool says which experts are not idle."""
    lowest = torch.where(used, scores, 0.0).min()
    return torch.where(used, scores, lowest - lowest.abs().clamp(min=1))


def mean(statistics: LayerStatistics, total: Tensor) -> Tensor:
    """total [E] / count, idle experts lowest."""
    return idle_lowest(statistics, total / statistics.count.clamp(min=1))


def cosines(gram: Tensor) -> Tensor:
    """gram [E, E] / its norms; 0 where a norm is 0."""
    norm = gram.diagonal().clamp(min=0).sqrt()
    return torch.where(norm[:, None] * norm > 0, gram / (norm[:, None] * norm), 0.0)


def distances(gram: Tensor) -> Tensor:
    """[E, E] Euclidean distances, from inner products."""
    square = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    return square.clamp(min=0).sqrt().fill_diagonal_(0)


def others(pairs: Tensor) -> Tensor:
    """Row sums of [E, E] without the diagonal."""
    return pairs.sum(1) - pairs.diagonal()
