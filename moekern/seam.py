"""The one place where a model's experts are measured: a function called instead of the model's own experts forward.

It sees the exact ids and gates the model uses, computes the outputs of the routed rows only, and hands them to the
kernel that combines and measures. Families that do not go through transformers' experts interface get an adapter.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekern.errors import InputError
from moekern.model.transformers_api import (
    EXPERTS_FUNCTIONS,
    experts_implementation,
    grouped_linear,
    is_experts_module,
    router_modules,
)
from moekern.recorder import Recorder
from moekern.routed import Outputs, Seen, route

NAME = "moekern"


@dataclass
class Chosen(Exception):
    """Leaves a block as soon as its router has chosen: what the experts would have been called with."""

    ids: Tensor  # [T, K], below 0 or from num_experts on where a slot is empty
    gates: Tensor  # [T, K], as they multiply what `outputs` gives
    num_experts: int
    outputs: Outputs


@dataclass
class Probe:
    """What the seam knows about one layer's experts module while it is observed."""

    layer: str
    score: str
    empty_slots: bool  # the model may hand out ids that are no expert
    recorder: Recorder
    logits: Tensor | None = None  # of the batch in flight, from the router's hook
    norm: tuple[Tensor, Tensor] | None = None  # input and output of the norm that ran last
    ids: Tensor | None = None  # [T, K] of the batch that ran last
    choosing: bool = False  # raise Chosen instead of running experts

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
        """Run the routed rows of hidden [T, H] and combine them, [T, H]. `outputs` is as in routed.Seen."""
        logits, self.logits = self.logits, None
        norm, self.norm = self.norm, None
        if self.choosing:
            raise Chosen(ids, torch.ones_like(gates) if gates_applied else gates, num_experts, outputs)
        self.ids = ids
        routed = route(ids, num_experts, empty_slots=self.empty_slots, backend=self.recorder.backend)
        y = outputs(routed.order // ids.shape[1], routed.offsets)
        residual = _stream(norm, hidden, y)
        seen = Seen(logits, ids, gates, routed, y, outputs, residual, gates_applied)
        return self.recorder.measure(self.layer, self.score, seen)


def _stream(norm: tuple[Tensor, Tensor] | None, hidden: Tensor, y: Tensor) -> Tensor | None:
    """The residual stream [T, H]: what went into the norm whose output is the experts' input; None where none is."""
    if norm is None:
        return None
    before, after = norm
    same = after.data_ptr() == hidden.data_ptr() and after.numel() == hidden.numel()
    if not same or before.shape != after.shape or before.shape[-1] != y.shape[1]:
        return None
    return before.reshape(-1, before.shape[-1]).to(y.dtype).contiguous()


@contextmanager
def observed(
    model: nn.Module, layers: Mapping[str, nn.Module], recorder: Recorder, *, score: str, empty_slots: bool = False
) -> Iterator[dict[str, Probe]]:
    """Measure the experts of these decoder layers (plan key -> module) into `recorder` while the context is open.

    Gives each layer's probe.
    Raises InputError for a layer whose experts moekern has no way to see.
    """
    with ExitStack() as stack:
        interfaced: list[nn.Module] = []
        probes: dict[str, Probe] = {}
        for key, layer in layers.items():
            probe = probes[key] = Probe(key, score, empty_slots, recorder)
            block = experts_of(layer)
            if block is None:
                raise InputError(f"layer {key}: {type(layer).__name__} has no experts that moekern can observe")
            block._moekern_probe = probe  # type: ignore[assignment]
            stack.callback(delattr, block, "_moekern_probe")
            if type(block).__name__ in ADAPTERS:
                block.forward = types.MethodType(ADAPTERS[type(block).__name__], block)
                stack.callback(delattr, block, "forward")
            else:
                interfaced.append(block)
            for path, index in router_modules(layer, model).items():
                handle = layer.get_submodule(path).register_forward_hook(_keep_logits(probe, index))
                stack.callback(handle.remove)
            for child in layer.children():
                if "Norm" in type(child).__name__:
                    stack.callback(child.register_forward_hook(_keep_norm(probe)).remove)
        stack.enter_context(experts_implementation(interfaced, NAME))
        yield probes


def experts_of(layer: nn.Module) -> nn.Module | None:
    """The module of a decoder layer that moekern measures, if there is one."""
    for module in layer.modules():
        if type(module).__name__ in ADAPTERS or is_experts_module(module):
            return module
    return None


def _keep_logits(probe: Probe, index: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        logits = output[index] if isinstance(output, tuple) else output
        probe.logits = logits.reshape(-1, logits.shape[-1])

    return hook


def _keep_norm(probe: Probe) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            probe.norm = args[0], output

    return hook


@torch.no_grad()
def measured_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Drop-in for transformers' experts functions: the routed rows only, combined and measured in one read of each."""
    return _measured(self, hidden_states, top_k_index, top_k_weights, self.num_experts, _interface_outputs)


RowOutputs = Callable[[Any, Tensor, Tensor], Tensor]  # (module, rows [N, H] grouped by expert, offsets [E + 1]) -> y


def _measured(self: Any, hidden: Tensor, ids: Tensor, gates: Tensor, num_experts: int, of_rows: RowOutputs) -> Tensor:
    def outputs(tokens: Tensor, offsets: Tensor) -> Tensor:
        return of_rows(self, hidden[tokens], offsets)

    probe: Probe = self._moekern_probe
    if probe.empty_slots:
        ids = torch.where(gates == 0, -1, ids)
    return probe.measure(hidden, ids, gates, num_experts, outputs).to(hidden.dtype)


def _interface_outputs(self: Any, rows: Tensor, offsets: Tensor) -> Tensor:
    """Outputs of rows grouped by expert, from the attributes transformers sets on every experts class it decorates."""
    sizes = offsets.diff()
    ends = offsets[1:].to(torch.int32)

    def bias(name: str) -> Tensor | None:
        return getattr(self, name).repeat_interleave(sizes, dim=0, output_size=len(rows)) if self.has_bias else None

    if self.has_gate:
        up = grouped_linear(rows, self.gate_up_proj, ends, bias("gate_up_proj_bias"), self.is_transposed)
        inner = self._apply_gate(up)
    else:
        inner = self.act_fn(grouped_linear(rows, self.up_proj, ends, bias("up_proj_bias"), self.is_transposed))
    y = grouped_linear(inner, self.down_proj, ends, bias("down_proj_bias"), self.is_transposed)
    return self.post_expert_norm(y) if self.has_post_expert_norm else y


@torch.no_grad()
def _step3p7(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    def outputs(self: Any, rows: Tensor, offsets: Tensor) -> Tensor:
        ends = offsets[1:].to(torch.int32)
        return grouped_linear(self._apply_gate(grouped_linear(rows, self.gate_up_proj, ends)), self.down_proj, ends)

    return _measured(self, hidden_states, top_k_index, top_k_weights, self.num_experts, outputs)


@torch.no_grad()
def _longcat_flash(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Ids from the number of routed experts on are identity experts: they add gate x input and are not counted."""

    def outputs(self: Any, rows: Tensor, offsets: Tensor) -> Tensor:
        ends = offsets[1:].to(torch.int32)
        up = grouped_linear(rows, self.gate_up_proj[: self.num_routed_experts], ends)
        gate, up = up.chunk(2, dim=-1)
        return grouped_linear(self.act_fn(gate) * up, self.down_proj, ends)

    identity = (top_k_weights * (top_k_index >= self.num_routed_experts)).sum(1, keepdim=True)
    routed = _measured(self, hidden_states, top_k_index, top_k_weights, self.num_routed_experts, outputs)
    return routed + (hidden_states * identity).to(hidden_states.dtype)


@torch.no_grad()
def _dbrx(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    def outputs(self: Any, rows: Tensor, offsets: Tensor) -> Tensor:
        ends = offsets[1:].to(torch.int32)
        w1, v1, w2 = (
            w.view(self.num_experts, self.ffn_hidden_size, self.hidden_size)
            for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2)
        )
        inner = self.mlp.activation_fn(grouped_linear(rows, w1, ends)) * grouped_linear(rows, v1, ends)
        return grouped_linear(inner, w2, ends, is_transposed=True)

    flat = hidden_states.reshape(-1, self.hidden_size)
    return _measured(self, flat, top_k_index, top_k_weights, self.num_experts, outputs).view_as(hidden_states)


@torch.no_grad()
def _llama4(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4 scales the expert's input by its gate, so the outputs already are the gated contributions."""
    hidden = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden)
    ids = logits.topk(self.top_k, dim=1).indices
    scales = torch.sigmoid(logits.float()).to(logits.dtype)  # the gate of every expert, were it chosen

    def outputs(tokens: Tensor, offsets: Tensor) -> Tensor:
        expert = torch.arange(self.num_experts, device=hidden.device).repeat_interleave(offsets.diff())
        rows = hidden[tokens] * scales[tokens, expert][:, None]
        ends = offsets[1:].to(torch.int32)
        gate, up = grouped_linear(rows, self.experts.gate_up_proj, ends, is_transposed=True).chunk(2, dim=-1)
        return grouped_linear(up * self.experts.act_fn(gate), self.experts.down_proj, ends, is_transposed=True)

    gates = scores.gather(1, ids)
    out = self._moekern_probe.measure(hidden, ids, gates, self.num_experts, outputs, gates_applied=True)
    return self.shared_expert(hidden) + out.to(hidden.dtype), logits


@torch.no_grad()
def _jetmoe(self: Any, layer_input: Tensor) -> Tensor:
    hidden = layer_input.reshape(-1, layer_input.shape[-1])
    logits = self.router(hidden)[-1]
    top, ids = logits.topk(self.router.top_k, dim=1)
    gates = F.softmax(top, dim=1).type_as(hidden)

    def outputs(tokens: Tensor, offsets: Tensor) -> Tensor:
        sizes = offsets.diff().tolist()
        gate, up = self.input_linear(hidden[tokens], sizes).chunk(2, dim=-1)
        return self.output_linear(self.activation(gate) * up, sizes)  # type: ignore[no-any-return]

    out = self._moekern_probe.measure(hidden, ids, gates, self.router.num_experts, outputs)
    return out.to(layer_input.dtype).view_as(layer_input) + self.bias  # type: ignore[no-any-return]


ADAPTERS: dict[str, Callable[..., Any]] = {
    "DbrxExperts": _dbrx,
    "JetMoeMoE": _jetmoe,
    "Llama4TextMoe": _llama4,
    "LongcatFlashExperts": _longcat_flash,
    "Step3p7Experts": _step3p7,
}
EXPERTS_FUNCTIONS.register(NAME, measured_experts)
