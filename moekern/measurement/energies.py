"""The energies of experts' channels: sums of (gate x inner activation)^2, added up while a layer runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekern.errors import InputError
from moekern.kernels import sort_by_expert
from moekern.measurement.batch import InFlight
from moekern.model.apart import Combining
from moekern.model.experts import Outputs, RowsHere, Watcher, experts_of, in_place
from moekern.model.projections import halves, views


@dataclass
class Energies:
    """A watcher that adds up what goes into down, and leaves all else to another one, with the rows computed already.

    Where outputs are contributions already (Llama 4), the gate is one. A token that the batch in flight does not count
    adds nothing.
    """

    layer: str
    energy: Tensor  # [E, I] float64, added to in place; may be exchanged between batches
    within: Watcher
    flight: InFlight | None = None

    @property
    def empty_slots(self) -> bool:
        return self.within.empty_slots

    @property
    def differentiable(self) -> bool:
        return self.within.differentiable

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
        """As `experts.Watcher`. Raises InputError where experts run in groups."""
        if not isinstance(outputs, RowsHere):
            what = "energies of channels are measured of whole layers, and its experts run in groups"
            raise InputError(f"layer {self.layer}: {what}; give more (--memory, --gpu-memory)", kind="memory")
        order, offsets = sort_by_expert(ids, num_experts)
        order = order[: int(offsets[-1])]
        tokens = order // ids.shape[1]
        inner = outputs.inner(tokens, offsets)
        weights = torch.ones_like(tokens, dtype=gates.dtype) if gates_applied else gates.flatten()[order]
        mask = None if self.flight is None or self.flight.context is None else self.flight.context.mask
        add_energy(inner.detach(), weights.detach(), offsets, None if mask is None else mask[tokens], self.energy)
        known = Known(outputs, tokens, offsets, outputs.outer(inner, offsets))
        return self.within.measure(hidden, ids, gates, num_experts, known, gates_applied=gates_applied)


@dataclass(frozen=True)
class Known:
    """Outputs of which some rows are there."""

    outputs: Outputs
    tokens: Tensor  # [N]
    offsets: Tensor  # [E + 1]
    y: Tensor  # [N, H]

    def __call__(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        same = torch.equal(offsets, self.offsets) and torch.equal(tokens, self.tokens)
        return self.y if same else self.outputs(tokens, offsets)


def add_energy(inner: Tensor, gates: Tensor, offsets: Tensor, mask: Tensor | None, energy: Tensor) -> None:
    """Add the squares of gates [N] x inner [N, I], rows grouped by expert, to energy [E, I] float64; of rows that
    mask [N] keeps."""
    bounds = offsets.tolist()
    for e, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        squares = (inner[start:stop].float() * gates[start:stop].float()[:, None]).double().square_()
        energy[e] += (squares if mask is None else squares[mask[start:stop]]).sum(0)


@contextmanager
def adding_energies(key: str, layer: nn.Module, flight: InFlight | None = None) -> Iterator[Energies]:
    """Add up the energies of a decoder layer's experts, whose weights must be loaded, while the context is open, around
    whatever watches them already. Where nothing does, no other layer of the model may run meanwhile.

    Raises InputError for experts whose channels cannot be seen.
    """
    block = experts_of(layer)
    if block is None or halves(block) is None:
        raise InputError(f"layer {key}: its experts are not held together, so that their channels cannot be seen")
    up, within = views(block).up, getattr(block, "_moekern_probe", None)
    device = None if up.is_meta else up.device
    energies = Energies(
        key, torch.zeros(up.shape[:2], dtype=torch.float64, device=device), within or Combining(), flight
    )
    with ExitStack() as stack:
        if within is None:
            stack.enter_context(in_place(block, energies))
        else:
            block._moekern_probe = energies  # type: ignore[assignment]
            stack.callback(setattr, block, "_moekern_probe", within)
        yield energies
