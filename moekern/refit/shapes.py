"""How many experts, and how wide, at the same bytes: tried on a part of the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.losses import Evaluation, mean_loss
from moekern.plan.document import Plan
from moekern.refit.ridge import Ridge
from moekern.refit.variants import Variant
from moekern.router import Router, count_problem

AUTO = "auto"
TRIED = (1.0, 0.875, 0.75, 0.625, 0.5)  # widths over I; and the width at which all experts stay
TRIAL = 8192  # tokens of a domain that shapes are tried on
RIDGE = Ridge(factors=(0.3,), sweeps=2)  # which is enough to rank them
WIDTH_STEP = 8  # what transformers' grouped products need in bfloat16; engines need more


@dataclass(frozen=True, order=True)
class Shape:
    """`experts` of `width` channels in each layer."""

    experts: int
    width: int

    def __str__(self) -> str:
        return f"{self.experts}x{self.width}"


def parse_shape(text: str) -> Shape | None:
    """"21x48", or None for "auto". Raises InputError."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if found is None and text != AUTO:
        raise InputError(f"--shape {text}: expected auto, or experts x channels such as 64x512")
    return None if found is None else Shape(int(found[1]), int(found[2]))


def candidates(
    router: Router, width: int, share: float, allowed: Callable[[int], bool] = lambda m: not m % WIDTH_STEP
) -> list[Shape]:
    """Shapes of at most `share` of the bytes of all experts, of `width` I: from few and whole to many and narrow.

    `allowed` says which widths there may be; the whole one always is.
    """
    E, found = router.num_experts, list[Shape]()
    for part in (*TRIED, share):
        wanted = int(part * width + 1e-9)
        narrow = next((m for m in range(wanted, 0, -1) if m == width or allowed(m)), None)
        if narrow is None:
            continue
        most = min(E, int(share * E * width / narrow + 1e-9))
        count = most // router.n_group * router.n_group
        if count and count_problem(count, router) is None and Shape(count, narrow) not in found:
            found.append(Shape(count, narrow))
    return sorted(found)


def trials(shapes: Sequence[Shape], plan_of: Callable[[int], Plan], width: int) -> list[Variant]:
    """A variant for each shape; `plan_of` says which experts stay, of so many."""
    return [
        Variant(str(shape), plan_of(shape.experts), None if shape.width == width else shape.width, RIDGE)
        for shape in shapes
    ]


def some_of(data: TokenData) -> TokenData:
    """The first sequences of each domain, up to TRIAL tokens and one at least."""
    left = dict.fromkeys(data.tokens, TRIAL)
    taken: list[Batch] = []
    for batch in data.batches:
        rows = max(0, left[batch.domain]) // batch.input_ids.shape[1] or int(left[batch.domain] == TRIAL)
        some = batch.input_ids[:rows]
        left[batch.domain] -= some.numel() if len(some) else TRIAL
        if len(some):
            taken.append(Batch(batch.domain, some))
    return replace(data, batches=tuple(taken))


def best(shapes: Sequence[Shape], found: Evaluation) -> tuple[Shape, Mapping[str, float]]:
    """The shape whose variant is nearest to the original, and the mean over domains of each one's KL in nats."""
    kl = {str(shape): mean_loss({d: loss.kl for d, loss in found[str(shape)].items()}) for shape in shapes}
    return min(shapes, key=lambda shape: (kl[str(shape)], shape)), kl
