"""What a layer's experts are made of: their rows in two halves, views of their weights, and one of them alone.

The inner half of an expert makes I channels of its input, the outer half makes the output of these. Each way in which
transformers' modules hold experts is one `Halves`; experts that are modules of their own in a list have none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moekern.model.layer_lists import is_experts_module
from moekern.model.products import grouped_linear

Half = Callable[[Any, Tensor, Tensor], Tensor]  # (block, rows grouped by expert, offsets [E + 1]) -> rows


@dataclass(frozen=True)
class Views:
    """The weights of E experts of I channels that are given and put out H numbers: views of the live parameters, so
    that `copy_` changes these. Gate and up are None where the block has none."""

    gate: Tensor | None  # [E, I, H]
    up: Tensor  # [E, I, H]
    down: Tensor  # [E, H, I]
    gate_bias: Tensor | None = None  # [E, I]
    up_bias: Tensor | None = None  # [E, I]
    down_bias: Tensor | None = None  # [E, H]


@dataclass(frozen=True)
class Halves:
    """How a block's experts are computed, and where it holds them. Called, it gives the output rows [N, H].

    `inner` makes of rows [N, H] what goes into down [N, I], `outer` makes of that the output [N, H].
    """

    inner: Half
    outer: Half
    weights: Callable[[Any], Views]
    parameters: Sequence[str]  # names, within the block, of what holds experts and nothing else; down comes last
    counts: Sequence[str] = ("num_experts",)  # names of the attributes that say how many there are
    linear: bool = True  # the output is linear in down (and its bias)

    def __call__(self, block: Any, rows: Tensor, offsets: Tensor) -> Tensor:
        return self.outer(block, self.inner(block, rows, offsets), offsets)


def halves(block: nn.Module) -> Halves | None:
    """How the block's experts are computed; None where it holds them in no way that is known here."""
    found = HALVES.get(type(block).__name__)
    if found is not None or not is_experts_module(block):
        return found
    of: Any = block
    names = ["gate_up_proj" if of.has_gate else "up_proj", "down_proj"]
    biases = [f"{name}_bias" for name in names] if of.has_bias else []
    return replace(INTERFACE, parameters=(*biases, *names), linear=not of.has_post_expert_norm)


def views(block: nn.Module) -> Views:
    """The weights of the block's experts. Raises ValueError where `halves` knows none."""
    return _known(block).weights(block)


def one_expert(block: nn.Module, expert: int, *, requires_grad: bool = True) -> nn.Module:
    """A block of the same kind with copies of this expert's weights: `halves(block)` computes its rows, with offsets
    [0, N]. Its parameters are the expert's alone. Raises ValueError where `halves` knows no experts.
    """
    known = _known(block)
    count = _attribute(block, known.counts[0])
    rows = len(block.get_parameter(known.parameters[-1])) // count
    alone = _frozen(block)
    for path in known.parameters:
        owner, name = _owner(alone, path)
        own = block.get_parameter(path).detach()[expert * rows : (expert + 1) * rows].clone()
        del owner._buffers[name]
        owner.register_parameter(name, nn.Parameter(own, requires_grad=requires_grad))
    for path in known.counts:
        owner, name = _owner(alone, path)
        setattr(owner, name, 1)
    return alone


def _known(block: nn.Module) -> Halves:
    found = halves(block)
    if found is None:
        raise ValueError(f"[projections] block: expected experts that are held together, got {type(block).__name__}")
    return found


def _frozen(module: nn.Module) -> nn.Module:
    """A copy of a module that shares all tensors and has no parameters: these are buffers."""
    made = copy.copy(module)
    made._parameters = {}
    made._buffers = {
        **module._buffers,
        **{name: p if p is None else p.detach() for name, p in module._parameters.items()},
    }
    made._modules = {name: part and _frozen(part) for name, part in module._modules.items()}
    return made


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    part, _, name = path.rpartition(".")
    return module.get_submodule(part), name


def _attribute(module: nn.Module, path: str) -> int:
    owner, name = _owner(module, path)
    return int(getattr(owner, name))


def _ends(offsets: Tensor) -> Tensor:
    return offsets[1:].to(torch.int32)


def _bias(self: Any, name: str) -> Tensor | None:
    """[E, ...]; None where experts have none."""
    return getattr(self, name) if self.has_bias else None


def _interface_inner(self: Any, rows: Tensor, offsets: Tensor) -> Tensor:
    """From the attributes that transformers sets on every experts class it decorates."""
    name = "gate_up_proj" if self.has_gate else "up_proj"
    up = grouped_linear(rows, getattr(self, name), _ends(offsets), _bias(self, f"{name}_bias"), self.is_transposed)
    return self._apply_gate(up) if self.has_gate else self.act_fn(up)  # type: ignore[no-any-return]


def _interface_outer(self: Any, inner: Tensor, offsets: Tensor) -> Tensor:
    y = grouped_linear(inner, self.down_proj, _ends(offsets), _bias(self, "down_proj_bias"), self.is_transposed)
    return self.post_expert_norm(y) if self.has_post_expert_norm else y


def _interface_views(self: Any) -> Views:
    def weight(name: str) -> Tensor:
        return _turned(getattr(self, name)) if self.is_transposed else getattr(self, name).detach()  # type: ignore[no-any-return]

    def bias(name: str) -> Tensor | None:
        return getattr(self, f"{name}_bias").detach() if self.has_bias else None  # type: ignore[no-any-return]

    down = weight("down_proj"), bias("down_proj")
    if not self.has_gate:
        return Views(None, weight("up_proj"), down[0], None, bias("up_proj"), down[1])
    (gate, up), both = _parted(weight("gate_up_proj"), self.is_concatenated), bias("gate_up_proj")
    gate_bias, up_bias = (None, None) if both is None else _parted(both, self.is_concatenated)
    return Views(gate, up, down[0], gate_bias, up_bias, down[1])


def _parted(gate_up: Tensor, concatenated: bool = True) -> tuple[Tensor, Tensor]:
    """Gate and up [E, I, ...] of both [E, 2I, ...]: one behind the other, or alternating."""
    if not concatenated:
        return gate_up[:, ::2], gate_up[:, 1::2]
    gate, up = gate_up.chunk(2, dim=1)
    return gate, up


def _turned(weight: Tensor) -> Tensor:
    return weight.detach().transpose(1, 2)


def _step3p7_inner(self: Any, rows: Tensor, offsets: Tensor) -> Tensor:
    return self._apply_gate(grouped_linear(rows, self.gate_up_proj, _ends(offsets)))  # type: ignore[no-any-return]


def _longcat_inner(self: Any, rows: Tensor, offsets: Tensor) -> Tensor:
    gate_up = grouped_linear(rows, self.gate_up_proj[: self.num_routed_experts], _ends(offsets))
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up  # type: ignore[no-any-return]


def _plain_outer(self: Any, inner: Tensor, offsets: Tensor) -> Tensor:
    return grouped_linear(inner, self.down_proj, _ends(offsets))


def _plain_views(self: Any) -> Views:
    """Rows of `gate_up_proj` beyond the experts' belong to LongCat-Flash's identity experts, which use none."""
    return Views(*_parted(self.gate_up_proj.detach()[: len(self.down_proj)]), self.down_proj.detach())


def _dbrx_weight(self: Any, name: str) -> Tensor:
    """[E, I, H]"""
    return getattr(self.mlp, name).view(self.num_experts, self.ffn_hidden_size, self.hidden_size)  # type: ignore[no-any-return]


def _dbrx_inner(self: Any, rows: Tensor, offsets: Tensor) -> Tensor:
    gate, up = (grouped_linear(rows, _dbrx_weight(self, name), _ends(offsets)) for name in ("w1", "v1"))
    return self.mlp.activation_fn(gate) * up  # type: ignore[no-any-return]


def _dbrx_outer(self: Any, inner: Tensor, offsets: Tensor) -> Tensor:
    return grouped_linear(inner, _dbrx_weight(self, "w2"), _ends(offsets), is_transposed=True)


def _dbrx_views(self: Any) -> Views:
    gate, up, down = (_dbrx_weight(self, name).detach() for name in ("w1", "v1", "w2"))
    return Views(gate, up, down.transpose(1, 2))


def _llama4_inner(self: Any, rows: Tensor, offsets: Tensor) -> Tensor:
    gate_up = grouped_linear(rows, self.experts.gate_up_proj, _ends(offsets), is_transposed=True)
    gate, up = gate_up.chunk(2, dim=-1)
    return up * self.experts.act_fn(gate)  # type: ignore[no-any-return]


def _llama4_outer(self: Any, inner: Tensor, offsets: Tensor) -> Tensor:
    return grouped_linear(inner, self.experts.down_proj, _ends(offsets), is_transposed=True)


def _llama4_views(self: Any) -> Views:
    return Views(*_parted(_turned(self.experts.gate_up_proj)), _turned(self.experts.down_proj))


def _jetmoe_inner(self: Any, rows: Tensor, offsets: Tensor) -> Tensor:
    gate, up = grouped_linear(rows, self.input_linear.weight, _ends(offsets)).chunk(2, dim=-1)
    return self.activation(gate) * up  # type: ignore[no-any-return]


def _jetmoe_outer(self: Any, inner: Tensor, offsets: Tensor) -> Tensor:
    return grouped_linear(inner, self.output_linear.weight, _ends(offsets))


def _jetmoe_views(self: Any) -> Views:
    return Views(*_parted(self.input_linear.weight.detach()), self.output_linear.weight.detach())


PLAIN = ("gate_up_proj", "down_proj")
INTERFACE = Halves(_interface_inner, _interface_outer, _interface_views, PLAIN)
HALVES = {  # of blocks that do not go through transformers' experts interface, by class
    "DbrxExperts": Halves(_dbrx_inner, _dbrx_outer, _dbrx_views, ("mlp.w1", "mlp.v1", "mlp.w2")),
    "JetMoeMoE": Halves(
        _jetmoe_inner,
        _jetmoe_outer,
        _jetmoe_views,
        ("input_linear.weight", "output_linear.weight"),
        ("input_linear.num_experts", "output_linear.num_experts", "router.num_experts"),
    ),
    "Llama4TextMoe": Halves(
        _llama4_inner, _llama4_outer, _llama4_views, tuple(f"experts.{name}" for name in PLAIN), ("num_experts",)
    ),
    "LongcatFlashExperts": Halves(_longcat_inner, _plain_outer, _plain_views, PLAIN, ("num_routed_experts",)),
    "Step3p7Experts": Halves(_step3p7_inner, _plain_outer, _plain_views, PLAIN),
}
