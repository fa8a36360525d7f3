"""Shapes of the same bytes, tried on a part of the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from moekern.data.batches import Batch, TokenData
from moekern.evaluation.losses import Evaluation, mean_of
from moekern.plan.document import Plan
from moekern.plan.shapes import Shape
from moekern.refit.ridge import Ridge
from moekern.refit.variants import Variant

TRIAL = 8192  # tokens of a domain that shapes are tried on
RIDGE = Ridge(factors=(0.3,), sweeps=2)  # which is enough to rank them


def trials(shapes: Sequence[Shape], plan_of: Callable[[int], Plan], width: int) -> list[Variant]:
    """A variant for each shape; `plan_of` says which experts stay, of so many."""
    return [
        Variant(str(shape), plan_of(shape.experts), None if shape.width == width else shape.width, RIDGE)
        for shape in shapes
    ]


def trial_text(data: TokenData) -> TokenData:
    """The first sequences of each domain, up to TRIAL tokens and one at least."""
    left = dict.fromkeys(data.tokens, TRIAL)
    taken: list[Batch] = []
    for batch in data.batches:
        rows = max(0, left[batch.domain]) // batch.input_ids.shape[1] or int(left[batch.domain] == TRIAL)
        some = batch.part(slice(rows))
        left[batch.domain] -= some.input_ids.numel() if rows else TRIAL
        if rows:
            taken.append(some)
    return replace(data, batches=tuple(taken))


def best(shapes: Sequence[Shape], found: Evaluation) -> tuple[Shape, Mapping[str, float]]:
    """The shape whose variant is nearest to the original, and the mean over domains of each one's KL in nats."""
    kl = {str(shape): mean_of(found[str(shape)], "kl") for shape in shapes}
    return min(shapes, key=lambda shape: (kl[str(shape)], shape)), kl
