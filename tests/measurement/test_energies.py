"""Energies of channels against their definition, token by token, and what is measured beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekern.calibration.observe import observe
from moekern.errors import InputError
from moekern.measurement.batch import BatchContext, InFlight
from moekern.measurement.energies import Known, adding_energies
from moekern.model.apart import Combining
from moekern.model.experts import experts_of, in_place
from moekern.model.projections import halves
from moekern.model.transformers_api import loader_of
from tests.helpers import families

NAMES = ("qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash", "dbrx", "jetmoe", "muse_spark", "nemotron_h")


@dataclass
class Spy(Combining):
    """Notes what it is given."""

    seen: list[tuple[Any, ...]] = field(default_factory=list)

    def measure(self, hidden: Tensor, ids: Tensor, gates: Tensor, num_experts: int, outputs: Any,
                *, gates_applied: bool = False) -> Tensor:  # fmt: skip
        self.seen.append((hidden, ids, gates, outputs, gates_applied))
        return super().measure(hidden, ids, gates, num_experts, outputs, gates_applied=gates_applied)


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder layers with experts."""
    return [layer for layer in loader_of(model).decoder_layers()[1] if experts_of(layer) is not None]


@contextmanager
def spying(model: Any, empty_slots: bool) -> Iterator[Spy]:
    """Watch all layers; gives what watches the last."""
    with ExitStack() as stack:
        for layer in layers_of(model):
            block, spy = experts_of(layer), Spy(empty_slots)
            assert block is not None
            stack.enter_context(in_place(block, spy))
        yield spy


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_energies_are_sums_over_tokens(name: str, whole_model: Callable[[str], Any]) -> None:
    model, ids = whole_model(name), families.input_ids(name, 2, 12)
    layer, empty = layers_of(model)[-1], name == "longcat_flash"
    block = experts_of(layer)
    assert block is not None
    known = halves(block)
    assert known is not None
    with spying(model, empty):
        plain = families.forward(model, ids)
    mask = torch.arange(24) % 5 != 0
    flight = InFlight(BatchContext("d", (2, 12), mask))
    with spying(model, empty) as spy, adding_energies("x", layer, flight) as energies:
        assert torch.equal(families.forward(model, ids), plain)
    ((hidden, chosen, gates, outputs, applied),) = spy.seen
    assert applied == (name == "llama4_text")
    E, width = energies.energy.shape
    want = torch.zeros(E, width, dtype=torch.float64)
    for t in range(24):
        for e, gate in zip(chosen[t].tolist(), gates[t], strict=True):
            if 0 <= e < E and mask[t]:
                row = hidden[t : t + 1] * (gate if applied else 1)
                offsets = (torch.arange(E + 1) > e).long()
                inner = known.inner(block, row, offsets)[0]
                want[e] += (inner * (1 if applied else gate)).double().square()
    assert int((want > 0).sum()) > width
    torch.testing.assert_close(energies.energy, want, rtol=1e-4, atol=1e-9)
    assert isinstance(outputs, Known)
    assert outputs(outputs.tokens, outputs.offsets) is outputs.y  # the rows are computed once
    others = torch.arange(3), torch.tensor([0, 3, *[3] * (E - 1)])
    assert outputs(*others).shape == (3, outputs.y.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text"])
def test_what_is_measured_beside_them_stays_the_same(name: str, whole_model: Callable[[str], Any]) -> None:
    model, ids = whole_model(name), families.input_ids(name)
    with observe(model) as alone:
        plain = families.forward(model, ids)
    layer = layers_of(model)[-1]
    with observe(model) as beside, adding_energies("x", layer) as energies:
        assert torch.equal(families.forward(model, ids), plain)
    for key in alone.layers:
        for domain in alone.domains:
            a, b = vars(alone.layers[key][domain]), vars(beside.layers[key][domain])
            assert all(torch.equal(torch.as_tensor(a[field]), torch.as_tensor(b[field])) for field in a), key
    assert bool((energies.energy.sum(1) > 0).any())
    assert not hasattr(experts_of(layer), "_moekern_probe")


class Elsewhere:
    """As `experts.Apart`: rows that are not there."""

    def outputs(self, hidden: Tensor, of_rows: Any, scales: Any) -> Any:
        return lambda tokens, offsets: hidden[tokens]


@contextmanager
def apart(block: Any) -> Iterator[None]:
    block._moekern_apart = Elsewhere()
    try:
        yield
    finally:
        del block._moekern_apart


@torch.no_grad()
def test_without_a_watcher_and_where_channels_cannot_be_seen(whole_model: Callable[[str], Any]) -> None:
    model, ids = whole_model("qwen3_moe"), families.input_ids("qwen3_moe")
    layers, found = layers_of(model), []
    for times in (1, 2):
        with ExitStack() as stack:
            found.append([stack.enter_context(adding_energies(str(i), layer)).energy for i, layer in enumerate(layers)])
            for _ in range(times):
                families.forward(model, ids)
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(twice, 2 * once)
    with (
        observe(model),
        adding_energies("3", layers[-1]),
        apart(experts_of(layers[-1])),
        pytest.raises(InputError, match="layer 3: energies .* its experts run in groups"),
    ):
        families.forward(model, ids)
    with pytest.raises(InputError, match="layer 7: its experts are not held"), adding_energies("7", nn.Linear(2, 2)):
        pass
