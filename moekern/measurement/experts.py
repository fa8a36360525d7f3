"""The function that is called instead of a model's own experts, and measures them: the routed rows only, with the
exact ids and gates that the model uses. Families that do not go through transformers' experts interface get an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moekern.measurement.probe import Probe
from moekern.model.transformers_api import EXPERTS_FUNCTIONS, grouped_linear

NAME = "moekern"


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
