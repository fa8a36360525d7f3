"""Experts of a decoder layer that return a constant: the router and the gates stay the model's own.

Rows that go to such experts are not computed. What a token gets of them is the sum of its gates times their constants,
in float32, as vLLM's expert substitution adds it. Where outputs of experts are gated already (Llama 4, whose experts
are given gate times input), a constant stands for the gated output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekern.errors import InputError
from moekern.model.apart import Combining
from moekern.model.expert_lists import LIST, expert_modules
from moekern.model.experts import Outputs, experts_of, in_place

Constants = Mapping[int, Tensor]  # expert -> [H], or [1] of one that returns the same number everywhere


@dataclass
class Substituting:
    """A watcher that measures nothing, and knows experts that are constants: `places` [E + 1] int64 has each one's row
    of `values` [n, H] float32, and n, a row of zeros, for all others and for empty slots."""

    places: Tensor
    values: Tensor
    empty_slots: bool = True
    differentiable: bool = False

    def measure(
        self,
        hidden: Tensor,
        ids: Tensor,
        gates: Tensor,
        num_experts: int,
        outputs: Outputs,
        *,
        gates_applied: bool = False,
    ) -> Tensor:
        """As `experts.Watcher`."""
        rows = self.places[torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).long()]
        replaced = rows < len(self.values) - 1
        left = torch.where(replaced, torch.full_like(ids, -1), ids)
        own = Combining().measure(hidden, left, gates, num_experts, outputs, gates_applied=gates_applied)
        weights = torch.ones_like(gates) if gates_applied else gates
        weights, out = weights.float() * replaced, own.float()
        for k in range(ids.shape[1]):  # a slot at a time: [T, K, H] is never held
            out = out + weights[:, k, None] * self.values[rows[:, k]]
        return out.to(own.dtype)


class Constant(nn.Module):
    """An expert of a list that returns a constant [H] for every row."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        width = rows.shape[-1] if len(self.value) == 1 else len(self.value)
        return self.value.to(rows).expand(*rows.shape[:-1], width).clone()


@contextmanager
def substituted_layer(layer: nn.Module, key: str, num_experts: int, constants: Constants) -> Iterator[None]:
    """Let experts of a decoder layer return their constants while the context is open. `key` names it, for errors."""
    block = experts_of(layer)
    if block is None:
        raise InputError(f"layer {key}: {type(layer).__name__} has no experts that moekern can replace by constants")
    with ExitStack() as stack:
        if expert_modules(block) is not None:
            stack.enter_context(_in_list(block._modules[LIST], constants))
        elif constants:
            stack.enter_context(in_place(block, _watcher(block, num_experts, constants)))
        yield


def _watcher(block: nn.Module, num_experts: int, constants: Constants) -> Substituting:
    device = next(block.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    values = torch.stack([value.float() for value in constants.values()])
    places = torch.full((num_experts + 1,), len(values), dtype=torch.int64)
    places[list(constants)] = torch.arange(len(values))
    return Substituting(places.to(device), torch.cat([values, torch.zeros_like(values[:1])]).to(device))


@contextmanager
def _in_list(experts: nn.Module | None, constants: Constants) -> Iterator[None]:
    assert isinstance(experts, nn.ModuleList)
    before = {expert: experts[expert] for expert in constants}
    try:
        for expert, value in constants.items():
            experts[expert] = Constant(value)
        yield
    finally:
        for expert, module in before.items():
            experts[expert] = module
