"""Where a model's numbers stop being finite, and which of its weights make them so. Weights are looked at only then."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from moekern.kernels.checks import short
from moekern.model.expert_lists import LIST

NAMED = 8  # experts that a message names


class NotFinite(Exception):
    """Hidden states hold NaN or infinities behind decoder layer `layer`.

    -1 is in front of the first layer; the number of layers stands for what follows the last: norm, head and loss.
    """

    def __init__(self, layer: int) -> None:
        super().__init__(f"not finite behind decoder layer {layer}")
        self.layer = layer
        self.task: object = None  # of the pass


def all_finite(value: object) -> bool:
    """Whether a tensor holds no NaN and no infinity, in one read of it; what holds no floating-point numbers is."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return True
    low, high = value.detach().aminmax()  # NaN where there is one
    return bool(low.isfinite() & high.isfinite())


def blamed_weight(layer: nn.Module, routers: Collection[str], held: Sequence[int]) -> str | None:
    """The first of a decoder layer's weights that is not finite, in words; None where all are.

    `held` are the original numbers of the experts that the layer has now, `routers` the names of its routers.
    """
    for name, value in _numbers(layer):
        if not _wrong(value):
            continue
        rows = _expert_rows(name, value, routers, len(held))
        experts = [held[e] for e, row in enumerate(rows) if _wrong(row)]
        where = f" for {expert_list(experts)}" if experts else ""
        return f"{name} is not finite{where}{_hint(value)}"
    return None


def blamed_outside(model: nn.Module, layers_name: str, *, head: bool) -> str | None:
    """The same of what lies outside the decoder layers: with `head` from the last of it on, else from the first."""
    outside = [(name, value) for name, value in _numbers(model) if not name.startswith(layers_name + ".")]
    for name, value in reversed(outside) if head else outside:
        if _wrong(value):
            rows = [i for i, row in enumerate(value) if _wrong(row)] if value.ndim == 2 else []
            where = f" in row {rows[0]} of {len(value)}" if rows and len(rows) < len(value) else ""
            return f"{name} is not finite{where}{_hint(value)}"
    return None


def out_of_range(what: str, dtype: torch.dtype) -> str:
    """What is to be said where all weights are finite and `what` is not."""
    other = "; try another type (--dtype)" if dtype == torch.float16 else ""
    return f"{what} not finite, though weights are: they leave the range of {short(dtype)}{other}"


def wrong_experts(value: Tensor) -> list[int]:
    """Of numbers for each expert, [E] or [E, ..], the experts with one that is not finite."""
    return (~value.isfinite().reshape(len(value), -1).all(1)).nonzero().flatten().tolist()


def expert_list(experts: Sequence[int]) -> str:
    """ "expert 5", "experts 1, 5", and of many the first few."""
    shown = ", ".join(map(str, experts[:NAMED]))
    more = f" and {len(experts) - NAMED} more" if len(experts) > NAMED else ""
    return f"expert{'s' if len(experts) > 1 else ''} {shown}{more}"


def _numbers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights, and buffers that are vectors: biases that a router selects by. Buffers of more axes are masks."""
    vectors = ((name, buffer) for name, buffer in module.named_buffers() if buffer.ndim == 1)
    for name, value in (*module.named_parameters(), *vectors):
        if value.is_floating_point() and not value.is_meta:
            yield name, value


def _wrong(value: Tensor) -> bool:
    """A bias may be -inf, which takes an expert or a token out of the choice."""
    if all_finite(value):
        return False
    return value.ndim > 1 or not all_finite(value.detach().masked_fill(value == -torch.inf, 0))


def _of_router(name: str, routers: Collection[str]) -> bool:
    return any(name.startswith(router + ".") for router in routers if router)


def _expert_rows(name: str, value: Tensor, routers: Collection[str], experts: int) -> Sequence[Tensor]:
    """The part of each expert, along the first axis; nothing for a tensor that is not divided by experts.

    Of a tensor that is one expert's own, all, in that expert's place.
    """
    own = re.search(rf"(?:^|\.){LIST}\.(\d+)\.", name)
    if own is not None:
        return [value if e == int(own[1]) else value[:0] for e in range(experts)]
    stacked = "experts" in name.split(".") or value.ndim == 3
    if not (stacked or _of_router(name, routers)) or not experts or len(value) < experts:
        return ()
    per = len(value) // experts if not len(value) % experts else 1  # a router may have rows of what is no expert
    return [value[e * per : (e + 1) * per] for e in range(experts)]


def _hint(value: Tensor) -> str:
    """float16 is smaller than what checkpoints are stored in."""
    return " in float16; another type may hold them (--dtype)" if value.dtype == torch.float16 else ""
