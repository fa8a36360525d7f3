"""Forms against autograd: what they make at first, and gradients by their values."""

from __future__ import annotations

import pytest
import torch

from moekern.recovery.factors import Factored
from moekern.recovery.forms import Direct, Form, Lora, Scale

CASES: dict[str, tuple[Form, tuple[int, ...]]] = {
    "direct": (Direct(), (3, 4)),
    "a factor an expert, stacked": (Scale(4), (4, 5, 3)),
    "a factor an expert, rows": (Scale(4), (4 * 5, 3)),
    "a matrix": (Lora(2, 6.0), (5, 7)),
    "stacked matrices": (Lora(3, 6.0), (4, 5, 7)),
    "of a rank beyond the matrix": (Lora(9, 6.0), (3, 4)),
}
GRADIENTS = {
    **CASES,
    "factors and a rest": (Factored(3), (4, 5, 7)),
    "factors and a rest, turned": (Factored(3, turned=True), (4, 5, 7)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_made_at_first_is_the_parameter(case: str, dtype: torch.dtype) -> None:
    form, shape = CASES[case]
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = form.begun(base, 3)
    assert {name: tuple(value.shape) for name, value in values.items()} == form.shapes(shape)
    assert torch.equal(form.made(base, values).to(dtype), base)
    assert all(torch.equal(value, values[name]) for name, value in form.begun(base, 3).items())


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_are_those_of_autograd(case: str) -> None:
    form, shape = GRADIENTS[case]
    generator = torch.Generator().manual_seed(0)
    base, G = (torch.randn(shape, generator=generator) for _ in range(2))
    values = {name: torch.randn(size, generator=generator) for name, size in form.shapes(shape).items()}
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    (form.made(base, leaves) * G).sum().backward()  # type: ignore[no-untyped-call]
    got = form.gradients(base, values, G)
    assert got.keys() == values.keys()
    for name, leaf in leaves.items():
        torch.testing.assert_close(got[name], leaf.grad, rtol=1e-5, atol=1e-5)


def test_an_adapter_adds_alpha_over_rank_times_its_product() -> None:
    base = torch.zeros(2, 3)
    values = {"lora_A": torch.tensor([[1.0, 2.0, 3.0]] * 2), "lora_B": torch.tensor([[1.0, 1.0], [0.0, 5.0]])}
    assert torch.equal(Lora(2, 6.0).made(base, values), 3 * torch.tensor([[2.0, 4.0, 6.0], [5.0, 10.0, 15.0]]))


def test_adapters_begin_with_a_product_that_can_change() -> None:
    """A is drawn, by a seed of its own, within the bounds of a linear layer's weights; B is zeros."""
    first, second = (Lora(4, 1.0).begun(torch.zeros(2, 9, 16), seed) for seed in (0, 1))
    assert not first["lora_B"].any()
    assert 0.1 < float(first["lora_A"].abs().max()) <= 1 / 4
    assert not torch.equal(first["lora_A"], second["lora_A"])
    assert not torch.equal(first["lora_A"][0], first["lora_A"][1])
