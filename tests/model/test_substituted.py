"""Experts that return constants, against forward passes that are written out over tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.model.experts import experts_of
from moekern.model.projections import views
from moekern.model.substituted import Substituting, substituted_layer
from moekern.model.transformers_api import loader_of
from tests.helpers import families
from tests.helpers.in_flight import REFUSED, random_plan

TOLERANCE = 2e-5  # float32 logits of order 1: a token's sum over its experts takes another order
OTHERS = [
    "gpt_oss",
    "llama4_text",
    "dbrx",
    "jetmoe",
    "longcat_flash",
]  # called in ways of their own


def literal(block: nn.Module, constants: dict[int, Tensor]) -> Callable[..., Tensor]:
    """What experts do, token by token: the gates as they come, and the constant of a replaced expert."""
    forward = block.forward

    def call(hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for t in range(len(hidden)):
            for e, gate in zip(ids[t].tolist(), gates[t], strict=True):
                if e in constants:
                    out[t] += gate * constants[e]
                else:
                    out[t] += gate * forward(hidden[t : t + 1], torch.tensor([[e]]), torch.ones(1, 1))[0]
        return out

    return call


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", pytest.param("minimax_m2", marks=pytest.mark.whole)])
def test_constants_of_a_literal_forward(
    name: str, family_checkpoint: Callable[[str], Path], whole_model: Callable[[str], Any]
) -> None:
    model, layout = whole_model(name), find_layout(open_checkpoint(family_checkpoint(name)))
    loader, ids, generator = loader_of(model), families.input_ids(name, 2, 9, 5), torch.Generator().manual_seed(3)
    plan, (_, layers), places = random_plan(layout, 4), loader.decoder_layers(), loader.moe_places(layout)
    whole, found = families.forward(model, ids), list[Tensor]()
    for ours in (True, False):
        generator.manual_seed(3)
        with ExitStack() as stack:
            for key, layer in layout.layers.items():
                dropped = sorted(set(range(layer.num_experts)) - set(plan.layers[key].keep))
                constants = {e: 0.1 * torch.randn(families.HIDDEN, generator=generator) for e in dropped}
                module = layers[places[key]]
                if ours:
                    stack.enter_context(substituted_layer(module, key, layer.num_experts, constants))
                else:
                    block: Any = experts_of(module)
                    block.forward = literal(block, constants)
                    stack.callback(delattr, block, "forward")
            found.append(families.forward(model, ids))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=TOLERANCE)
    assert (found[0] - whole).abs().max() > 100 * TOLERANCE, "nothing was replaced"
    assert torch.equal(families.forward(model, ids), whole)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in OTHERS else pytest.mark.whole) for n in families.FAMILIES if n not in REFUSED],
)
def test_zeros_are_experts_whose_down_projection_is_zero(
    name: str, family_checkpoint: Callable[[str], Path], whole_model: Callable[[str], Any]
) -> None:
    """For every family that holds experts together, whatever it does with gates and inputs."""
    model, layout = whole_model(name), find_layout(open_checkpoint(family_checkpoint(name)))
    loader, ids = loader_of(model), families.input_ids(name, 2, 9, 5)
    plan, (_, layers), places = random_plan(layout, 4), loader.decoder_layers(), loader.moe_places(layout)
    dropped = {
        key: sorted(set(range(layer.num_experts)) - set(plan.layers[key].keep)) for key, layer in layout.layers.items()
    }
    whole = families.forward(model, ids)
    with ExitStack() as stack:
        for key, gone in dropped.items():
            constants = dict.fromkeys(gone, torch.zeros(1))
            experts = layout.layers[key].num_experts
            stack.enter_context(substituted_layer(layers[places[key]], key, experts, constants))
        got = families.forward(model, ids)
    with ExitStack() as stack:
        for key, gone in dropped.items():
            block = experts_of(layers[places[key]])
            assert block is not None
            stacks = [views(block).down, *(p for n, p in block.named_parameters() if "bias" in n and "down" in n)]
            for stacked in stacks:
                before = stacked[gone].clone()
                stack.callback(stacked.index_copy_, 0, torch.tensor(gone), before)
                stacked[gone] = 0
        want = families.forward(model, ids)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
    assert (got - whole).abs().max() > 100 * TOLERANCE, "nothing was replaced"


class Listed(nn.Module):
    """A block whose experts are modules in a list, called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        gates, ids = self.gate(hidden).softmax(-1).topk(2)
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            out[token] += expert(hidden[token]) * gates[token, slot, None]
        return out


@torch.no_grad()
def test_experts_in_a_list() -> None:
    torch.manual_seed(0)
    layer, hidden = nn.Sequential(Listed()), torch.randn(16, 3)
    block: Any = layer[0]
    before, whole = list(block.experts), layer(hidden)
    constants = {1: torch.tensor([1.0, 2.0, 3.0]), 2: torch.zeros(1)}
    want = torch.zeros_like(hidden)
    gates, ids = block.gate(hidden).softmax(-1).topk(2)
    for t, k in torch.cartesian_prod(torch.arange(16), torch.arange(2)).tolist():
        e = int(ids[t, k])
        want[t] += gates[t, k] * (constants[e] if e in constants else before[e](hidden[t]))
    with substituted_layer(layer, "0", 4, constants):
        torch.testing.assert_close(layer(hidden), want)
    assert list(block.experts) == before
    assert torch.equal(layer(hidden), whole)


def test_gates_that_are_applied_already() -> None:
    """Where outputs are gated contributions (Llama 4), a constant stands for one; and empty slots get nothing."""
    watcher = Substituting(torch.tensor([1, 0, 1, 1]), torch.tensor([[5.0, 7.0], [0.0, 0.0]]))
    hidden, ids, gates = torch.eye(2), torch.tensor([[0, 1], [1, 3]]), torch.tensor([[0.5, 0.25], [0.5, 0.0]])

    def outputs(tokens: Tensor, offsets: Tensor) -> Tensor:
        assert offsets.tolist() == [0, 1, 1, 1]
        return hidden[tokens]

    for applied, want in ((False, [[0.5 + 1.25, 1.75], [2.5, 3.5]]), (True, [[1.0 + 5.0, 7.0], [5.0, 7.0]])):
        got = watcher.measure(hidden, ids, gates, 3, outputs, gates_applied=applied)
        torch.testing.assert_close(got, torch.tensor(want))
