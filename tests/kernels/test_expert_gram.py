"""expert_gram against float64, and what changes no bit of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekern import _C, kernels
from moekern.kernels import native
from tests.helpers.grouped import SIZES, Size, assert_gram_agrees, fitting, gram, grouped, halves, started
from tests.helpers.ops import runs

ROADS = runs("expert_gram")


@pytest.mark.parametrize(("device", "backend"), ROADS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_agrees_with_the_reference(size: Size, masked: bool, device: str, backend: str) -> None:
    size = fitting(size, device, backend)
    args = grouped(size)
    got, want = gram(args, device, masked, backend=backend), gram(args, masked=masked, backend="reference")
    assert_gram_agrees(got, want, args, masked)


@pytest.mark.parametrize(("device", "backend"), ROADS)
def test_either_product_is_left_out_with_the_same_bits(device: str, backend: str) -> None:
    args = grouped(SIZES["odd"])
    want, (gram_alone, without) = gram(args, device, backend=backend), halves(args, device, backend=backend)
    assert torch.equal(gram_alone, want.gram)
    assert torch.equal(without, want.product)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_by_hand(backend: str) -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    r, sums = torch.tensor([[1.0], [10.0]]), kernels.gram_sums(2, 2, 1)
    offsets, tokens = torch.tensor([0, 2, 3]), torch.tensor([1, 0, 1])
    for _ in range(2):
        kernels.expert_gram(a, r, offsets, None, sums, tokens=tokens, backend=backend)
    assert sums.gram.tolist() == [[[20, 28], [28, 40]], [[50, 60], [60, 72]]]
    assert sums.product.tolist() == [[[26], [48]], [[100], [120]]]


@given(
    rows=st.lists(st.integers(0, 300), min_size=1, max_size=4), M=st.integers(1, 70), H=st.integers(1, 70),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_size(rows: list[int], M: int, H: int, seed: int) -> None:
    args = grouped(Size(tuple(rows), M, H, 300), seed=seed)
    assert_gram_agrees(gram(args, backend="native"), gram(args, backend="reference"), args)


@pytest.mark.usefixtures("threads")
def test_bits_depend_on_neither_threads_nor_instruction_set() -> None:
    args, first = grouped(Size((530, 3, 0, 259), 77, 301, 600)), None
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        for level in _C.levels():
            got = started(args)
            native.expert_gram(args.a, args.r, args.offsets, args.mask, got, tokens=args.tokens, level=level)
            first = first or got
            assert all(torch.equal(x, y) for x, y in zip(got, first, strict=True)), (count, level)


def test_rows_that_are_masked_or_gathered_before_give_the_same_bits() -> None:
    args = grouped(Size((530, 3, 300), 20, 40, 600), behind=0)
    kept = [args.mask[start:stop].sum() for start, stop in zip(args.offsets, args.offsets[1:], strict=False)]
    offsets, sums = torch.tensor([0, *kept]).cumsum(0), started(args)
    kernels.expert_gram(args.a[args.mask], args.r[args.tokens[args.mask]], offsets, None, sums)
    assert all(torch.equal(x, y) for x, y in zip(sums, gram(args), strict=True))


def test_a_nan_stays_with_its_expert() -> None:
    args = grouped(SIZES["odd"])
    args.a[3, 5], args.mask[3] = torch.nan, True
    sums = gram(args)
    assert sums.gram[0, 5].isnan().all()
    assert sums.gram.isnan().sum() == 2 * 13 - 1
    assert sums.product.isnan().sum() == 45


SUMS = kernels.gram_sums(2, 3, 5)
GOOD: dict[str, Any] = {
    "a": torch.ones(6, 3), "r": torch.ones(6, 5), "offsets": torch.tensor([0, 2, 6]), "mask": None, "sums": SUMS,
    "tokens": torch.arange(6),
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"a": torch.ones(6, 3).double()}, "a: expected float32, got float64"),
    "strides": ({"r": torch.ones(5, 6).T}, "r: expected a contiguous tensor"),
    "rows": ({"r": torch.ones(4, 5), "tokens": None}, "r: expected N=6, got 4"),
    "gram": ({"sums": SUMS._replace(gram=torch.zeros(2, 2, 2).double())}, "gram: expected M=3, got 2"),
    "columns": ({"r": torch.ones(6, 4)}, "product: expected H=4, got 5"),
    "channels": ({"a": torch.ones(6, 2)}, "gram: expected M=2, got 3"),
    "experts": ({"offsets": torch.tensor([0, 2, 3, 6])}, "gram: expected E=3, got 2"),
    "no offsets": ({"offsets": torch.zeros(0).long()}, r"offsets: expected E\+1=1, got 0"),
    "sums": ({"sums": SUMS._replace(gram=torch.zeros(2, 3, 3))}, "gram: expected float64, got float32"),
    "mask": ({"mask": torch.ones(5).bool()}, "mask: expected N=6, got 5"),
    "tokens": ({"tokens": torch.arange(6).int()}, "tokens: expected int64, got int32"),
}
WILD: dict[str, tuple[dict[str, Any], str]] = {
    "first": ({"offsets": torch.tensor([1, 2, 6])}, "offsets: expected offsets rising from 0 to at most 6"),
    "falling": ({"offsets": torch.tensor([0, 7, 6])}, "offsets: expected offsets rising from 0 to at most 6"),
    "beyond": ({"offsets": torch.tensor([0, 2, 2**62])}, "offsets: expected offsets rising from 0 to at most 6"),
    "negative": ({"offsets": torch.tensor([0, -(2**62), 6])}, "offsets: expected offsets rising from 0 to at most 6"),
    "tokens": ({"tokens": torch.tensor([0, 1, 2, -1, 4, 5])}, "tokens: expected tokens from 0 to 5, got -1 in row 3"),
    "far tokens": ({"tokens": torch.tensor([6, 1, 2, 3, 4, 5])}, "tokens: expected tokens from 0 to 5, got 6 in row 0"),
    "no tokens": ({"r": torch.ones(0, 5)}, "tokens: expected tokens from 0 to -1, got 0 in row 0"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    args = {**GOOD, **change}
    with pytest.raises(ValueError, match=r"^\[expert_gram\] " + message):
        kernels.expert_gram(**args)
    with pytest.raises(ValueError, match=r"^\[expert_gram\] " + message.split(", got")[0]):
        native.expert_gram(**args)
    assert not any(s.any() for s in SUMS)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("change", "message"), WILD.values(), ids=WILD)
def test_a_wrong_value_is_refused_before_anything_is_added(change: Any, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=r"^\[expert_gram\] " + message + "$"):
        kernels.expert_gram(**{**GOOD, **change}, backend=backend)
    assert not any(s.any() for s in SUMS)
