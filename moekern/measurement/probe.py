"""What is known about one layer's experts module while it is watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moekern.measurement.batch import InFlight, Seen, route
from moekern.measurement.recorder import Recorder
from moekern.model.experts import Asking, Outputs


@dataclass
class Chosen(Exception):
    """Leaves a block as soon as its router has chosen: what the experts would have been called with."""

    ids: Tensor  # [T, K], below 0 or from num_experts on where a slot is empty
    gates: Tensor  # [T, K], as they multiply what `outputs` gives
    num_experts: int
    outputs: Outputs
    logits: Tensor | None = None  # [T, E or more] where the router gives them


@dataclass
class Probe:
    """What is known about one layer's experts module while it is watched."""

    layer: str
    empty_slots: bool  # the model may hand out ids that are no expert
    recorder: Recorder
    flight: InFlight
    logits: Tensor | None = None  # of the batch in flight, from the router's hook
    norm: tuple[Tensor, Tensor] | None = None  # input and output of the norm that ran last
    ids: Tensor | None = None  # [T, K] of the batch that ran last
    gates: Tensor | None = None  # of the same, as they multiply its outputs
    choosing: bool = False  # raise Chosen instead of running experts
    differentiable: bool = False
    gain: Callable[[], Tensor] | None = None  # [E], as the layer holds it now

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
        """Run the routed rows of hidden [T, H] and combine them, [T, H]. `outputs` is as in batch.Seen."""
        logits, self.logits = self.logits, None
        norm, self.norm = self.norm, None
        if self.choosing:
            raise Chosen(ids, torch.ones_like(gates) if gates_applied else gates, num_experts, outputs, logits)
        self.ids, self.gates = ids, torch.ones_like(gates) if gates_applied else gates
        context, backend = self.flight.context, self.recorder.backend
        if context is None:
            raise RuntimeError(f"layer {self.layer}: experts ran in no batch that was announced")
        routed = route(ids, num_experts, empty_slots=self.empty_slots, backend=backend)
        own = routed.order // ids.shape[1], routed.offsets
        if isinstance(outputs, Asking):
            outputs.ask([own, *self.recorder.further(logits, ids, routed, context)])
        y = outputs(*own)
        gain = None if self.gain is None else self.gain()
        gain = None if gain is None or gain.shape != (num_experts,) else gain
        seen = Seen(logits, ids, gates, routed, y, outputs, stream(norm, hidden, y), gates_applied, gain)
        return self.recorder.measure(self.layer, seen, context)


def stream(norm: tuple[Tensor, Tensor] | None, hidden: Tensor, y: Tensor) -> Tensor | None:
    """The residual stream [T, H]: what went into the norm whose output is the experts' input; None where none is."""
    if norm is None:
        return None
    before, after = norm
    same = after.data_ptr() == hidden.data_ptr() and after.numel() == hidden.numel()
    if not same or before.shape != after.shape or before.shape[-1] != y.shape[1]:
        return None
    return before.reshape(-1, before.shape[-1]).to(y.dtype).contiguous()
