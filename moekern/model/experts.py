"""How experts are called and computed: the function that is called instead of a model's own experts, for every family.

It runs the routed rows only, with the exact ids and gates that the model uses, and leaves it to the module's `Watcher`
what becomes of them. Families that do not go through transformers' experts interface get an adapter.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekern.model.expert_lists import expert_modules
from moekern.model.layer_lists import is_experts_module
from moekern.model.products import PIECE, gathered, pieces
from moekern.model.projections import Half, Halves, halves
from moekern.model.transformers_api import EXPERTS_FUNCTIONS, experts_implementation

NAME = "moekern"

Outputs = Callable[[Tensor, Tensor], Tensor]  # (tokens [N], offsets [E + 1]) -> y [N, H]
RowOutputs = Callable[[Any, Tensor, Tensor], Tensor]  # (module, rows [N, H] grouped by expert, offsets [E + 1]) -> y
Scales = Callable[[Tensor, Tensor], Tensor]  # (tokens [N], offsets [E + 1]) -> [N], which rows are multiplied by


class Watcher(Protocol):
    """What is done with a call of a layer's experts; hangs on their module as `_moekern_probe`."""

    @property
    def empty_slots(self) -> bool:
        """The model may hand out ids that are no expert."""

    @property
    def differentiable(self) -> bool:
        """Where autograd is on, it stays on."""

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
        """Run the routed rows of hidden [T, H] and combine them, [T, H]. `outputs` is as in measurement.batch.Seen."""


@runtime_checkable
class Asking(Protocol):
    """Outputs that are not computed when they are called for, and must be asked for before."""

    def ask(self, wanted: Sequence[tuple[Tensor, Tensor]]) -> None:
        """These are the calls that will come. May leave the pass, to be asked the same again in another one."""

    def __call__(self, tokens: Tensor, offsets: Tensor) -> Tensor: ...


class Apart(Protocol):
    """Computes rows in another place than the layer; hangs on the experts' module as `_moekern_apart`."""

    def outputs(self, hidden: Tensor, of_rows: RowOutputs, scales: Scales | None) -> Asking: ...


@dataclass(frozen=True)
class RowsHere:
    """What a block's experts make of rows of hidden [T, H], computed where it is asked for; see `steady`."""

    block: nn.Module
    hidden: Tensor
    known: Halves
    scales: Scales | None

    def __call__(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        scales = None if self.scales is None else self.scales(tokens, offsets)
        return steady(self.known, self.block, self.hidden, tokens, offsets, scales)


def rows_of(module: nn.Module, hidden: Tensor, scales: Scales | None = None) -> RowsHere | Asking:
    """What the experts make of any rows of hidden [T, H]: `Outputs`."""
    known = halves(module)
    assert known is not None
    apart: Apart | None = getattr(module, "_moekern_apart", None)
    return RowsHere(module, hidden, known, scales) if apart is None else apart.outputs(hidden, known, scales)


def scaled(hidden: Tensor, tokens: Tensor, offsets: Tensor, scales: Scales | None) -> Tensor:
    """The rows [N, H] that experts are given."""
    rows = hidden[tokens]
    return rows if scales is None else rows * scales(tokens, offsets)[:, None]


def _instead(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is called in the place of experts: without autograd, but for a watcher that is differentiable."""

    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._moekern_probe.differentiable):
            return function(self, *args, **kwargs)

    return call


@_instead
def watched_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Drop-in for transformers' experts functions: the routed rows only, in the watcher's hands."""
    return _watched(self, hidden_states, top_k_index, top_k_weights, self.num_experts)


def _watched(self: Any, hidden: Tensor, ids: Tensor, gates: Tensor, num_experts: int) -> Tensor:
    watcher: Watcher = self._moekern_probe
    if watcher.empty_slots:
        ids = torch.where(gates == 0, -1, ids)
    return watcher.measure(hidden, ids, gates, num_experts, rows_of(self, hidden)).to(hidden.dtype)


@_instead
def _step3p7(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return _watched(self, hidden_states, top_k_index, top_k_weights, self.num_experts)


@_instead
def _longcat_flash(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Ids from the number of routed experts on are identity experts: they add gate x input and are not counted."""
    identity = (top_k_weights * (top_k_index >= self.num_routed_experts)).sum(1, keepdim=True)
    routed = _watched(self, hidden_states, top_k_index, top_k_weights, self.num_routed_experts)
    return routed + (hidden_states * identity).to(hidden_states.dtype)


@_instead
def _dbrx(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    flat = hidden_states.reshape(-1, self.hidden_size)
    return _watched(self, flat, top_k_index, top_k_weights, self.num_experts).view_as(hidden_states)


@_instead
def _llama4(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4 scales the expert's input by its gate, so the outputs already are the gated contributions."""
    hidden = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden)
    ids = logits.topk(self.top_k, dim=1).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    gate_of = torch.where(chosen, scores, torch.sigmoid(logits.float()).to(logits.dtype))  # were it chosen

    def scales(tokens: Tensor, offsets: Tensor) -> Tensor:
        expert = torch.arange(self.num_experts, device=hidden.device).repeat_interleave(offsets.diff())
        return gate_of[tokens, expert]

    gates, outputs = scores.gather(1, ids), rows_of(self, hidden, scales)
    out = self._moekern_probe.measure(hidden, ids, gates, self.num_experts, outputs, gates_applied=True)
    return self.shared_expert(hidden) + out.to(hidden.dtype), logits


@_instead
def _jetmoe(self: Any, layer_input: Tensor) -> Tensor:
    hidden = layer_input.reshape(-1, layer_input.shape[-1])
    logits = self.router(hidden)[-1]
    top, ids = logits.topk(self.router.top_k, dim=1)
    gates = F.softmax(top, dim=1).type_as(hidden)
    outputs = rows_of(self, hidden)
    out = self._moekern_probe.measure(hidden, ids, gates, self.router.num_experts, outputs)
    return out.to(layer_input.dtype).view_as(layer_input) + self.bias  # type: ignore[no-any-return]


ADAPTERS: dict[str, Callable[..., Any]] = {
    "DbrxExperts": _dbrx,
    "JetMoeMoE": _jetmoe,
    "Llama4TextMoe": _llama4,
    "LongcatFlashExperts": _longcat_flash,
    "Step3p7Experts": _step3p7,
}
EXPERTS_FUNCTIONS.register(NAME, watched_experts)


def experts_of(layer: nn.Module) -> nn.Module | None:
    """The module of a decoder layer whose calls can be watched, if there is one."""
    for module in layer.modules():
        if type(module).__name__ in ADAPTERS or is_experts_module(module) or expert_modules(module) is not None:
            return module
    return None


@contextmanager
def in_place(block: nn.Module, watcher: Watcher, forward: Callable[..., Any] | None = None) -> Iterator[None]:
    """Let a layer's experts be run by the functions of this module, in a watcher's hands, while the context is open.

    `forward` is of blocks that have one of their own kind.
    """
    with ExitStack() as stack:
        block._moekern_probe = watcher  # type: ignore[assignment]
        stack.callback(delattr, block, "_moekern_probe")
        forward = forward or ADAPTERS.get(type(block).__name__)
        if forward is None:
            stack.enter_context(experts_implementation([block], NAME))
        else:
            block.forward = types.MethodType(forward, block)
            stack.callback(delattr, block, "forward")
        yield


def steady(
    half: Half, block: nn.Module, source: Tensor, tokens: Tensor, offsets: Tensor, scales: Tensor | None = None
) -> Tensor:
    """What experts make of rows source[tokens] times scales [N], with the same bits whatever the number of threads;
    see `products`."""
    if source.device.type != "cpu":
        return half(block, gathered(source, tokens, scales), offsets)
    made: Tensor | None = None
    for rows in pieces(offsets.tolist(), PIECE // (source.shape[1] * source.itemsize)):
        own = gathered(source, tokens[rows], None if scales is None else scales[rows])
        part = half(block, own, offsets.clamp(rows.start, rows.stop) - rows.start)[: rows.stop - rows.start]
        if len(part) == len(tokens):
            return part
        made = part.new_empty(len(tokens), part.shape[1]) if made is None else made
        made[rows] = part
    assert made is not None
    return made
