"""Sums over weights against float64, and stable ranks against the singular values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekern import _C, kernels
from moekern.kernels import WeightSums, native, of_expert, stable_rank, weight_stats, weight_sums
from moekern.kernels.dequantize import dequantize
from moekern.kernels.quantised import mxfp4, scaled
from tests.helpers.ops import DTYPES, U, runs
from tests.helpers.stored import CASES
from tests.helpers.weights import (
    SHAPES,
    SUM,
    assert_a_nan_code_is_seen,
    assert_agree,
    assert_blocks_need_not_divide,
    assert_nan_and_infinity_are_seen,
    assert_quantised_agrees,
    defined,
    equal,
    summed,
    weights,
)

BACKENDS = kernels.available()["weight_stats"]["cpu"]
RUNS = [*runs("weight_stats"), ("cpu", "reference")]


@pytest.mark.parametrize(("device", "backend"), RUNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_weights_agree_with_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, backend: str
) -> None:
    w = weights(*shape, dtype=dtype)
    assert_agree(summed(w, shape[0], backend, device), defined(w))


@pytest.mark.parametrize(("device", "backend"), RUNS)
@pytest.mark.parametrize("case", CASES)
def test_quantised_weights_agree_with_what_they_stand_for(case: str, device: str, backend: str) -> None:
    assert_quantised_agrees(case, device, backend)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_fp8_blocks_that_do_not_divide_the_weight(device: str, backend: str) -> None:
    assert_blocks_need_not_divide(device, backend)


def test_by_hand() -> None:
    w = torch.tensor([[[3.0, -4.0]], [[0.0, 1.0]]])
    for backend in BACKENDS:
        s = summed(w, 2, backend)
        assert s.count.tolist() == [2, 2]
        assert s.abs_sum.tolist() == [7.0, 1.0]
        assert s.square_sum.tolist() == [25.0, 1.0]
        assert s.max_abs.tolist() == [4.0, 1.0]
        weight_stats(-2 * w, s, backend=backend)
        assert s.abs_sum.tolist() == [21.0, 3.0]
        assert s.max_abs.tolist() == [8.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_read(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = bits[bits.isfinite() & (bits.abs() < 1e15)].view(-1, 1, 1)  # squares of larger ones leave float32
    got = summed(finite, len(finite))
    assert torch.equal(got.abs_sum, finite.double().abs()[:, 0, 0])
    assert torch.equal(got.max_abs, finite.double().abs()[:, 0, 0])
    square = finite.float().square().double()[:, 0, 0]  # subnormal squares lose bits, as float32's do
    assert torch.equal(got.square_sum, square)


@pytest.mark.parametrize(("device", "backend"), RUNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [0, 31, 32, 2047, 2048, 4098])
def test_nan_and_infinity_are_seen_where_they_are(at: int, dtype: torch.dtype, device: str, backend: str) -> None:
    assert_nan_and_infinity_are_seen(at, dtype, device, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_code_is_seen(backend: str) -> None:
    assert_a_nan_code_is_seen(backend)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", ["float32", "bfloat16", "float16", *CASES])
def test_bits_depend_on_neither_threads_nor_instruction_set(case: str) -> None:
    dense = case in ("float32", "bfloat16", "float16")
    weight = weights(3, 301, 517, dtype=getattr(torch, case)) if dense else CASES[case]()[0]
    first: WeightSums | None = None
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for level in _C.levels():
            sums = weight_sums(3 if dense else 1)
            native.weight_stats(weight.flatten(1) if isinstance(weight, Tensor) else weight, sums, level=level)
            first = first or sums
            assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(sums, first, strict=True))


def test_bits_of_many_tasks_depend_on_no_thread() -> None:
    """More elements than one task sums, so that the order between tasks matters."""
    before = torch.get_num_threads()
    blocks = torch.randint(256, (2, 300, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weight = mxfp4(blocks, torch.full((2, 300, 16), 120, dtype=torch.uint8))
    results = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append((summed(weight, 2), summed(weights(2, 400, 600), 2)))
    finally:
        torch.set_num_threads(before)
    assert all(equal(a, b) for a, b in zip(*results, strict=True))
    assert_agree(results[0][0], defined(dequantize(weight, torch.float32)))


@given(E=st.integers(1, 4), R=st.integers(0, 40), C=st.integers(0, 90), cut=st.integers(0, 40), seed=st.integers(0, 99))
def test_matrices_one_by_one_add_up_to_the_stack(E: int, R: int, C: int, cut: int, seed: int) -> None:
    """Whatever is summed apart, experts or rows: only the chunks of float32 differ."""
    w, cut = weights(E, R, C, seed=seed), min(cut, R)
    whole, parts = summed(w, E), weight_sums(E)
    for e in range(E):
        weight_stats(w[e, :cut], of_expert(parts, e))
        weight_stats(w[e, cut:], of_expert(parts, e))
    assert torch.equal(parts.count, whole.count)
    assert torch.equal(parts.max_abs, whole.max_abs)
    torch.testing.assert_close(parts.abs_sum, whole.abs_sum, rtol=2 * SUM, atol=0)
    torch.testing.assert_close(parts.square_sum, whole.square_sum, rtol=2 * SUM, atol=0)


def test_experts_one_by_one_give_the_bits_of_the_stack() -> None:
    w = weights(3, 70, 1000, dtype=torch.bfloat16)
    codes = torch.randint(0, 120, (3, 70, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stack = scaled(codes.view(torch.float8_e4m3fn), torch.rand(3, 1, 1), None)
    parts = weight_sums(3), weight_sums(3)
    for e in range(3):
        weight_stats(w[e], of_expert(parts[0], e))
        weight_stats(stack.expert(e), of_expert(parts[1], e))
    assert equal(parts[0], summed(w, 3))
    assert equal(parts[1], summed(stack, 3))


WRONG: dict[str, tuple[Any, WeightSums, str]] = {
    "experts": (torch.zeros(3, 2, 2), weight_sums(2), "weight: expected E=2, got 3"),
    "matrix": (torch.zeros(2, 2), weight_sums(2), "weight: expected E=2, got 1"),
    "vector": (torch.zeros(4), weight_sums(1), r"weight: expected shape \[E, R, C\], got \[4\]"),
    "dtype": (
        torch.zeros(2, 2).double(),
        weight_sums(1),
        "weight: expected float32 or bfloat16 or float16, got float64",
    ),
    "strides": (torch.zeros(4, 6).T, weight_sums(1), "weight: expected a contiguous tensor, got strides"),
    "list": ([[1.0]], weight_sums(1), "weight: expected a tensor or a Quantised, got list"),
    "sums": (torch.zeros(1, 2, 2), weight_sums(1)._replace(max_abs=torch.zeros(1)), "max_abs: expected float64, got"),
    "stack": (CASES["mxfp4"]()[0], weight_sums(2), "weight: expected E=2, got 1"),
}


@pytest.mark.parametrize(("weight", "sums", "message"), WRONG.values(), ids=WRONG)
def test_the_wrong_argument_is_named(weight: Any, sums: WeightSums, message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[weight_stats\] " + message):
        weight_stats(weight, sums)


def test_the_extension_checks_for_itself() -> None:
    sums = weight_sums(2)
    quantised = CASES["gptq-order"]()[0]
    assert quantised.group is not None
    for weight, total, message in (
        (torch.zeros(3, 4), sums, "weight: expected E=2, got 3"),
        (torch.zeros(2, 4).double(), sums, "weight: expected float32"),
        (torch.zeros(4, 2).T, sums, "weight: expected a contiguous"),
        (quantised, sums, "codes: expected E=2, got 1"),
        (replace(quantised, group=quantised.group + 4), weight_sums(1), "group: expected values from 0 to 3"),
        (replace(quantised, group=None, block=(3, 1)), weight_sums(1), "scale: expected rows 22, got 4"),
    ):
        with pytest.raises(ValueError, match=r"^\[weight_stats\] " + message):
            native.weight_stats(weight, total)
        assert equal(total, weight_sums(len(total.count)))  # nothing was added
    with pytest.raises(ValueError, match=r"^\[weight_stats\] level: expected an instruction set"):
        native.weight_stats(torch.zeros(2, 4), sums, level="sse9")


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("shape", [(3, 40, 70), (2, 70, 40), (1, 1, 9), (1, 9, 1)], ids=str)
def test_stable_rank_agrees_with_the_singular_values(shape: tuple[int, int, int], tolerance: float) -> None:
    w = weights(*shape)
    square = torch.linalg.svdvals(w.double()).square()
    got, rounding = stable_rank(w, tolerance=tolerance), 100 * U  # float32 products of at most 70 terms
    assert got.dtype == torch.float64
    top = square.sum(1) / got
    assert (top < square[:, 0] * (1 + rounding)).all()  # a Rayleigh quotient is never above the largest eigenvalue
    # An eigenvalue is as near as the residual is small (Parlett, The Symmetric Eigenvalue Problem, theorem 4.5.1).
    assert ((square - top[:, None]).abs().amin(1) < (tolerance + rounding) * top).all()
    if tolerance < 1e-2:  # smaller than the gaps here: the eigenvalue is the largest
        assert (top > square[:, 0] * (1 - tolerance - rounding)).all()


def test_stable_rank_by_hand() -> None:
    identity, rank_one = torch.eye(20), torch.outer(torch.arange(5.0), torch.arange(8.0))
    assert float(stable_rank(identity)) == pytest.approx(20, rel=1e-5)
    assert float(stable_rank(rank_one)) == pytest.approx(1, rel=1e-5)
    assert float(stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])))) == pytest.approx(6 / 4, rel=1e-3)


def test_stable_rank_of_what_is_stored() -> None:
    weight, dense = CASES["awq"]()
    assert torch.equal(stable_rank(weight), stable_rank(dense))
    bf16 = weights(2, 30, 50, dtype=torch.bfloat16)
    assert torch.equal(stable_rank(bf16), stable_rank(bf16.float()))
    assert torch.equal(stable_rank(bf16)[1:], stable_rank(bf16[1]))


def test_stable_rank_of_matrices_without_one() -> None:
    assert stable_rank(torch.zeros(2, 3, 4)).tolist() == [0, 0]
    assert stable_rank(torch.zeros(1, 0, 4)).tolist() == [0]
    assert stable_rank(torch.full((1, 2, 2), torch.inf)).isnan().all()
    assert stable_rank(torch.full((1, 2, 2), torch.nan)).isnan().all()
    tiny, huge = torch.eye(5) * 1e-38, torch.eye(5) * 1e38
    assert stable_rank(torch.stack([tiny, huge])).tolist() == pytest.approx([5, 5], rel=1e-5)


def test_stable_rank_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"\[stable_rank\] tolerance: expected at least 1e-5 and less than 1, got 0"):
        stable_rank(torch.eye(3), tolerance=0)
    with pytest.raises(ValueError, match=r"\[stable_rank\] weight: expected shape \[E, R, C\]"):
        stable_rank(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"\[stable_rank\] steps: expected at most 2 products for a tolerance of"):
        stable_rank(weights(60, 60), tolerance=1e-4, steps=2)
