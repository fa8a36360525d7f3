"""gated_energy against float64, and what changes no bit of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekern import _C, kernels
from moekern.kernels import native
from tests.helpers.grouped import SIZES, Size, assert_energies_agree, energies, fitting, grouped, inner_rows
from tests.helpers.ops import DTYPES, runs


@pytest.mark.parametrize(("device", "backend"), runs("gated_energy"))
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_agrees_with_the_reference(size: Size, device: str, backend: str) -> None:
    args = grouped(fitting(size, device, backend))
    for dtype in DTYPES:
        rows = inner_rows(args, dtype)
        got = energies(rows, args, device, backend=backend)
        assert_energies_agree(got, energies(rows, args, backend="reference"), args)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_by_hand(backend: str) -> None:
    rows, gates = torch.tensor([[0.0, 4.0], [2.0, 3.0], [5.0, 6.0]]), torch.tensor([1.0, 2.0, 0.5])
    offsets, energy = torch.tensor([0, 2, 2]), torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(2):
        a = kernels.gated_energy(rows, gates, offsets, None, energy, backend=backend)
    assert a.tolist() == [[0, 4], [4, 6], [0, 0]]
    assert energy.tolist() == [[32, 104], [0, 0]]


@pytest.mark.usefixtures("threads")
def test_bits_depend_on_neither_threads_nor_instruction_set() -> None:
    args = grouped(Size((530, 3, 0, 259), 777, 1, 600))
    rows, first = inner_rows(args, torch.bfloat16), None
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        for level in _C.levels():
            energy = torch.ones(4, 777, dtype=torch.float64)
            a = native.gated_energy(rows, rows.new_ones(len(rows)), args.offsets, args.mask, energy, level=level)
            first = first or (a, energy)
            assert torch.equal(a, first[0]), (count, level)
            assert torch.equal(energy, first[1]), (count, level)


ENERGY = torch.zeros(2, 3, dtype=torch.float64)
GOOD: dict[str, Any] = {
    "rows": torch.ones(6, 3), "gates": torch.ones(6), "offsets": torch.tensor([0, 2, 6]), "mask": None,
    "energy": ENERGY,
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"rows": torch.ones(6, 3).double()}, "rows: expected float32 or bfloat16 or float16, got float64"),
    "strides": ({"rows": torch.ones(3, 6).T}, "rows: expected a contiguous tensor"),
    "gates": ({"gates": torch.ones(5)}, "gates: expected N=6, got 5"),
    "experts": ({"offsets": torch.tensor([0, 2, 3, 6])}, "offsets: expected |energy: expected "),
    "energy": ({"energy": torch.zeros(2, 3)}, "energy: expected float64, got float32"),
    "mask": ({"mask": torch.ones(5).bool()}, "mask: expected N=6, got 5"),
    "width": ({"rows": torch.ones(6, 5)}, "(rows|energy): expected M=., got ."),
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
