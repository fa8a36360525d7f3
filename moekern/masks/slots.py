"""What every expert is worth to the loss, from the gates' gradients of one pass through a layer under a mask.

An expert that stays counts by its gates in the masked model: sum over its tokens of gate x dL/dgate, the derivative of
the loss by a factor on its gates at 1 (`gate_gradient_sum`). An expert that is dropped has no gates there. Each token
that chose it in the unmasked layer, of the same input, gets an additional slot with that expert and a gate of 0, which
adds nothing to the output; dL/dgate times the gate that the unmasked router gave is what adding the expert with that
gate would change, to first order, and its gate in a model that keeps it too would be no smaller.

Where a router makes the gates of each token add up to one number, a factor on one expert's score takes from the others
what it gives to it. Then the derivative is gate x (dL/dgate - b), b the mean of the token's dL/dgate weighted by its
gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekern.errors import InputError
from moekern.model.apart import Asked
from moekern.model.experts import experts_of

ALIKE = 0.02  # sums of tokens' gates that differ by no larger share are one number, which 16 bits round
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Routing:
    """Of a layer's call of its experts: ids and gates [T, K]."""

    ids: Tensor
    gates: Tensor

    @property
    def adds_up(self) -> bool:
        """The gates of all tokens have one sum."""
        sums = self.gates.detach().double().sum(1)
        return bool(sums.max() - sums.min() <= ALIKE * sums.max()) if len(sums) else False


@dataclass
class Slots:
    """Filled when the experts are called. others: the additional gates, zeros, of `unmasked`'s shape."""

    num_experts: int
    masked: Routing
    others: Tensor
    unmasked: Routing

    @property
    def leaves(self) -> list[Tensor]:
        return [self.masked.gates, self.others]

    def worth(self, gradients: Sequence[Tensor | None], dropped: Sequence[int], *, plain: bool = False) -> Tensor:
        """float64 [E]: the derivative of the loss by each expert's mask, of the gradients by `leaves`; with `plain` no
        b is taken off."""
        own, other = (
            torch.zeros_like(leaf, dtype=torch.float64) if found is None else found.double()
            for leaf, found in zip(self.leaves, gradients, strict=True)
        )
        gates = self.masked.gates.detach().double()
        if self.masked.adds_up and not plain:
            mean = (gates * own).sum(1, keepdim=True) / gates.sum(1, keepdim=True)
            own, other = own - mean, other - mean
        stay = self._summed(self.masked.ids, gates * own)
        gone = self._summed(self.unmasked.ids, self.unmasked.gates.double() * other)
        away = torch.zeros(self.num_experts, dtype=torch.bool)
        away[list(dropped)] = True
        return torch.where(away, gone, stay)

    def _summed(self, ids: Tensor, values: Tensor) -> Tensor:
        ids, values = ids.flatten().to("cpu", torch.int64), values.flatten().cpu()
        real = (ids >= 0) & (ids < self.num_experts)
        return torch.zeros(self.num_experts, dtype=torch.float64).index_add_(0, ids[real], values[real])


def check_called(layer: nn.Module, key: str, what: str) -> None:
    """Raise InputError for experts that are not called with ids and gates."""
    kind = type(experts_of(layer)).__name__
    if kind in ("Llama4TextMoe", "JetMoeMoE"):
        raise InputError(f"{what}: layer {key}: {kind} calls its experts in a way of its own, without ids and gates")


@contextmanager
def with_slots(layer: nn.Module, num_experts: int, unmasked: Routing) -> Iterator[Slots]:
    """Calls of a layer's experts get additional slots while the context is open."""
    nothing = torch.zeros_like(unmasked.gates)
    slots = Slots(num_experts, Routing(unmasked.ids, nothing), nothing, unmasked)

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        found = _routing(args, kwargs)
        slots.masked, slots.others = found, torch.zeros_like(unmasked.gates, requires_grad=True)
        ids = torch.cat([found.ids, unmasked.ids.to(found.ids)], 1)
        return _replaced(args, kwargs, ids, torch.cat([found.gates, slots.others], 1))

    handle = _experts(layer).register_forward_pre_hook(called, with_kwargs=True)
    try:
        yield slots
    finally:
        handle.remove()


@contextmanager
def asking(layer: nn.Module) -> Iterator[list[Routing]]:
    """A pass through the layer ends where it calls its experts, and how it does is put into the list."""
    found = list[Routing]()

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        routing = _routing(args, kwargs)
        found.append(Routing(routing.ids.detach(), routing.gates.detach()))
        raise Asked

    handle = _experts(layer).register_forward_pre_hook(called, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _experts(layer: nn.Module) -> nn.Module:
    experts = experts_of(layer)
    assert experts is not None
    return experts


def _routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing:
    ids, gates = list(_tensors(args, kwargs).values())[1:3]
    return Routing(ids, gates)


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], ids: Tensor, gates: Tensor) -> Arguments:
    names = list(_tensors(args, kwargs))[1:3]
    values = {**dict(enumerate(args)), **kwargs, **dict(zip(names, (ids, gates), strict=True))}
    return tuple(values[i] for i in range(len(args))), {name: values[name] for name in kwargs}


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[Any, Tensor]:
    return {key: value for key, value in (*enumerate(args), *kwargs.items()) if isinstance(value, Tensor)}
