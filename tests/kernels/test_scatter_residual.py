"""scatter_residual against float64, and what changes no bit of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekern import _C, kernels
from moekern.kernels import native
from tests.helpers.grouped import SIZES, Size, assert_scattered_agrees, fitting, grouped, scattered
from tests.helpers.ops import runs


@pytest.mark.parametrize(("device", "backend"), runs("scatter_residual"))
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_agrees_with_the_reference(size: Size, device: str, backend: str) -> None:
    size = fitting(size, device, backend)
    args = grouped(size)
    got = scattered(args, device, backend=backend)
    assert_scattered_agrees(got, scattered(args, backend="reference"), args)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_by_hand(backend: str) -> None:
    r, a = torch.tensor([[10.0], [20.0], [30.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    delta, tokens = torch.tensor([[[1.0], [1.0]], [[2.0], [0.0]]]), torch.tensor([2, 0, 2])
    kernels.scatter_residual(r, a, delta, tokens, torch.tensor([0, 2, 3]), backend=backend)
    assert r.tolist() == [[3], [20], [17]]
    kernels.scatter_residual(r, a[:1], delta[1], tokens[1:2], torch.tensor([0, 1]), backend=backend)  # one expert
    assert r.tolist() == [[1], [20], [17]]


@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=4), M=st.integers(1, 300), H=st.integers(1, 70),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_size(rows: list[int], M: int, H: int, seed: int) -> None:
    args = grouped(Size(tuple(rows), M, H, 50), seed=seed)
    assert_scattered_agrees(scattered(args, backend="native"), scattered(args, backend="reference"), args)


@pytest.mark.usefixtures("threads")
def test_bits_depend_on_neither_threads_nor_instruction_set() -> None:
    args, first = grouped(Size((130, 3, 0, 25), 270, 401, 130)), None
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        for level in _C.levels():
            r = args.r.clone()
            native.scatter_residual(r, args.a, args.delta, args.tokens, args.offsets, level=level)
            first = r if first is None else first
            assert torch.equal(r, first), (count, level)


def test_experts_follow_one_another() -> None:
    args = grouped(Size((30, 30, 30), 20, 9, 30), behind=0)
    r = args.r.clone()
    for e in range(3):
        rows = slice(30 * e, 30 * e + 30)
        kernels.scatter_residual(r, args.a[rows], args.delta[e], args.tokens[rows], torch.tensor([0, 30]))
    assert torch.equal(r, scattered(args))


def test_what_is_predicted_exactly_leaves_the_rounding() -> None:
    """r made as a @ delta of what is then taken away: what stays is far below r."""
    args = grouped(Size((200,), 16, 24, 200), behind=0)
    r = torch.empty_like(args.r)
    r[args.tokens] = (args.a.double() @ args.delta[0].double()).float()
    largest = float(r.abs().max())
    kernels.scatter_residual(r, args.a, args.delta, args.tokens, args.offsets)
    assert float(r.abs().max()) < 1e-5 * largest


R = torch.zeros(4, 5)
GOOD: dict[str, Any] = {
    "r": R, "a": torch.ones(6, 3), "delta": torch.ones(2, 3, 5), "tokens": torch.tensor([0, 1, 0, 1, 2, 3]),
    "offsets": torch.tensor([0, 2, 6]),
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"a": torch.ones(6, 3).half()}, "a: expected float32, got float16"),
    "strides": ({"delta": torch.ones(2, 5, 3).mT}, "delta: expected a contiguous tensor"),
    "channels": ({"delta": torch.ones(2, 4, 5)}, "delta: expected M=3, got 4"),
    "columns": ({"delta": torch.ones(2, 3, 4)}, "delta: expected H=5, got 4"),
    "experts": ({"delta": torch.ones(1, 3, 5)}, "[a-z]*: expected E"),
    "tokens": ({"tokens": torch.arange(5)}, "tokens: expected N=6, got 5"),
    "ints": ({"tokens": torch.arange(6).int()}, "tokens: expected int64, got int32"),
}
WILD: dict[str, tuple[dict[str, Any], str]] = {
    "falling": ({"offsets": torch.tensor([0, 7, 6])}, "offsets: expected offsets rising from 0 to at most 6"),
    "beyond": ({"offsets": torch.tensor([0, 2, 2**62])}, "offsets: expected offsets rising from 0 to at most 6"),
    "negative": ({"tokens": torch.tensor([0, 1, 2, -1, 3, 0])}, "tokens: expected tokens from 0 to 3, got -1 in row 3"),
    "far": ({"tokens": torch.tensor([0, 1, 2, 3, 4, 0])}, "tokens: expected tokens from 0 to 3, got 4 in row 4"),
    "twice": (
        {"tokens": torch.tensor([0, 1, 1, 2, 3, 2])},
        "tokens: expected each token of expert 1 once, got token 2 again in row 5",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    args = {**GOOD, **change}
    with pytest.raises(ValueError, match=rf"^\[scatter_residual\] {message}"):
        kernels.scatter_residual(**args)
    with pytest.raises(ValueError, match=rf"^\[scatter_residual\] {message.split(', got')[0]}"):
        native.scatter_residual(**args)
    assert not R.any()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("change", "message"), WILD.values(), ids=WILD)
def test_a_wrong_value_is_refused_before_anything_is_changed(change: Any, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=rf"^\[scatter_residual\] {message}$"):
        kernels.scatter_residual(**{**GOOD, **change}, backend=backend)
    assert not R.any()
