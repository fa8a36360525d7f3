"""gated_energy against float64, and what changes no bit of it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from moekern import _C, kernels
from moekern.kernels import native, reference
from tests.helpers.grouped import SIZES, Size, assert_energies_agree, energies, fitting, grouped, projected
from tests.helpers.ops import DTYPES, runs

ACTIVATIONS = (None, *reference.ACTIVATIONS)


@pytest.mark.parametrize(("device", "backend"), runs("gated_energy"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_agrees_with_the_reference(size: Size, activation: str | None, device: str, backend: str) -> None:
    size = fitting(size, device, backend)
    args = grouped(size)
    every = list(product([2 * size.M, size.M] if activation else [size.M], DTYPES))
    for width, dtype in every[:1] + every[-1:] if backend == "triton" else every:
        rows = projected(args, width, dtype)
        got = energies(rows, args, activation, device, backend=backend)
        assert torch.equal(got[0], energies(rows, args, activation, backend="native")[0])
        assert_energies_agree(got, energies(rows, args, activation, backend="reference"), rows, args)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_by_hand(backend: str) -> None:
    rows, gates = torch.tensor([[0.0, 4.0], [2.0, 3.0], [5.0, 6.0]]), torch.tensor([1.0, 2.0, 0.5])
    offsets, energy = torch.tensor([0, 2, 2]), torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(2):
        a = kernels.gated_energy(rows, gates, offsets, None, energy, backend=backend)
    assert a.tolist() == [[0, 4], [4, 6], [0, 0]]
    assert energy.tolist() == [[32, 104], [0, 0]]
    energy = torch.zeros(2, 1, dtype=torch.float64)
    a = kernels.gated_energy(rows, gates, offsets, None, energy, activation="silu", backend=backend)
    assert a[:, 0].tolist() == pytest.approx([0, 2 * 2 / (1 + 2.718281828**-2) * 3, 0], rel=1e-6)


@pytest.mark.usefixtures("threads")
def test_bits_depend_on_neither_threads_nor_instruction_set() -> None:
    args = grouped(Size((530, 3, 0, 259), 777, 1, 600))
    for activation in ACTIVATIONS:
        rows, first = projected(args, 777 if activation is None else 1554, torch.bfloat16), None
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            for level in _C.levels():
                energy = torch.ones(4, 777, dtype=torch.float64)
                gates = rows.new_ones(len(rows))
                a = native.gated_energy(
                    rows, gates, args.offsets, args.mask, energy, activation=activation, level=level
                )
                first = first or (a, energy)
                assert torch.equal(a, first[0]), (count, level)
                assert torch.equal(energy, first[1]), (count, level)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ends_of_the_range_stay_finite_and_a_nan_is_seen(activation: str | None) -> None:
    rows = torch.tensor([[0.0], [-0.0], [1e-30], [-60.0], [60.0], [-3e4], [3e4], [-1e30], [1e30], [torch.nan]])
    energy, offsets = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0, 10])
    gates = torch.ones(10)
    a = kernels.gated_energy(rows, gates, offsets, torch.arange(10) < 7, energy, activation=activation)
    want = rows.double() if activation is None else reference.ACTIVATIONS[activation](rows.double())
    assert a[9].isnan()
    assert ((a.double() - want).abs() <= 16 * 2.0**-24 * rows.double().abs())[:9].all()
    assert energy.isfinite().all()


ENERGY = torch.zeros(2, 3, dtype=torch.float64)
GOOD: dict[str, Any] = {
    "rows": torch.ones(6, 6), "gates": torch.ones(6), "offsets": torch.tensor([0, 2, 6]), "mask": None,
    "energy": ENERGY, "activation": "silu",
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "relu"}, "activation: expected .*, got relu"),
    "dtype": ({"rows": torch.ones(6, 6).double()}, "rows: expected float32 or bfloat16 or float16, got float64"),
    "strides": ({"rows": torch.ones(6, 6).T}, "rows: expected a contiguous tensor"),
    "gates": ({"gates": torch.ones(5)}, "gates: expected N=6, got 5"),
    "experts": ({"offsets": torch.tensor([0, 2, 3, 6])}, "offsets: expected |energy: expected "),
    "energy": ({"energy": torch.zeros(2, 3)}, "energy: expected float64, got float32"),
    "mask": ({"mask": torch.ones(5).bool()}, "mask: expected N=6, got 5"),
    "width": ({"rows": torch.ones(6, 5)}, "rows: expected .*3.*, got 5"),
    "inner": ({"activation": None}, "rows: expected .*3.*, got 6"),
}
WILD = {
    "falling": torch.tensor([0, 7, 6]), "beyond": torch.tensor([0, 2, 2**62]), "first": torch.tensor([1, 2, 6]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    args = {**GOOD, **change}
    with pytest.raises(ValueError, match=rf"^\[gated_energy\] ({message})"):
        kernels.gated_energy(**args)
    with pytest.raises(ValueError, match=rf"^\[gated_energy\] ({message.split(', got')[0]})"):
        native.gated_energy(**args)
    assert not ENERGY.any()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("offsets", WILD.values(), ids=WILD)
def test_a_wrong_value_is_refused_before_anything_is_added(offsets: torch.Tensor, backend: str) -> None:
    with pytest.raises(ValueError, match=r"^\[gated_energy\] offsets: expected offsets rising from 0 to at most 6$"):
        kernels.gated_energy(**{**GOOD, "offsets": offsets}, backend=backend)
    assert not ENERGY.any()
