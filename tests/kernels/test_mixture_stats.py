"""mixture_stats: every backend against the reference, and the reference against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekern import _C, kernels
from tests.helpers.cases import EDGE, Case, Rows, rows
from tests.helpers.mixture import assert_mixtures_agree, mixed
from tests.helpers.ops import DTYPES, fitting, runs
from tests.helpers.pairwise import matrix


@matrix(runs("mixture_stats"), case=EDGE, dtype=DTYPES)
def test_agrees_with_the_reference(device: str, backend: str, case: Case, dtype: torch.dtype) -> None:
    case = fitting(case, device, backend)
    if (device, backend) == ("cpu", "triton") and case.K > 1:
        case = case._replace(T=min(case.T, 60))
    args = rows(case, dtype)
    got, want = mixed(args, case.E, device, backend), mixed(args, case.E, backend="reference")
    assert_mixtures_agree(got, want, args)


def test_by_hand() -> None:
    """Token 0: rows [2, 0] of expert 1 and [0, 4] of expert 0, a half each; token 1 is alone with expert 1."""
    y, weight = torch.tensor([[0.0, 4.0], [2.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.5, 0.5], [0.7, 1.0]])
    idx, order, offsets = torch.tensor([[1, 0], [9, 1]]), torch.tensor([1, 0, 3]), torch.tensor([0, 1, 3])
    for backend in kernels.available()["mixture_stats"]["cpu"]:
        sums, gram = kernels.mixture_sums(2), torch.zeros(2, 2, dtype=torch.float64)
        for _ in range(2):
            kernels.mixture_stats(y, weight, idx, order, offsets, None, sums, gram, backend=backend)
        d = (0.5**2 + 1) ** 0.5  # half of the distance of [2, 0] from [1, 2]
        want = {"mixture_norm_sum": [2 * d, 2 * d], "mixture_square_sum": [2.5, 2.5], "share_sum": [4]}
        want |= {"left_out_norm_sum": [4 * d, 4 * d], "left_out_square_sum": [10, 10], "share_square_sum": [4]}
        for name, value in want.items():
            torch.testing.assert_close(getattr(sums, name), torch.tensor(value).double(), rtol=1e-6, atol=0, msg=name)
        assert gram.tolist() == [[8, 0], [0, 2 + 50]]
    shares = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    sums = kernels.mixture_sums(2)
    kernels.mixture_stats(y, weight, idx, order, offsets, None, sums, share=shares)
    apart = [torch.tensor([-0.25, 1.5]).norm(), torch.tensor([0.25, -1.5]).norm() + 5]  # a share of nothing is 0
    torch.testing.assert_close(sums.mixture_norm_sum, torch.stack([torch.as_tensor(a) for a in apart]).double())


@pytest.mark.parametrize(("device", "backend"), runs("mixture_stats"))
def test_either_part_may_be_left_out(device: str, backend: str) -> None:
    case = fitting(EDGE["masked"], device, backend)
    args = rows(case, torch.bfloat16)
    sums, gram = mixed(args, case.E, device, backend)
    assert all(map(torch.equal, mixed(args, case.E, device, backend, gram=False)[0], sums))
    assert torch.equal(mixed(args, case.E, device, backend, sums=False)[1], gram)
    assert torch.equal(gram, gram.T)


@pytest.mark.usefixtures("threads")
def test_bits_depend_on_neither_threads_nor_instruction_set() -> None:
    args, first = rows(EDGE["all"], torch.float16), None
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        for level in _C.levels():
            got = mixed(args, EDGE["all"].E, level=level)
            first = first or got
            assert all(map(torch.equal, (*got[0], got[1]), (*first[0], first[1]))), (count, level)


def test_what_does_not_count_is_not_read_and_a_nan_is_seen() -> None:
    case = EDGE["masked"]
    args = rows(case)
    want = mixed(args, case.E)
    assert args.mask is not None
    token = args.order[: args.offsets[-1]] // case.K
    args.y[: len(token)][~args.mask[token]] = torch.nan
    got = mixed(args, case.E)
    assert all(map(torch.equal, (*got[0], got[1]), (*want[0], want[1])))
    args.y[: len(token)][args.mask[token]] = torch.nan
    sums, gram = mixed(args, case.E)
    assert sums.mixture_norm_sum[want[0].mixture_norm_sum > 0].isnan().all()
    assert gram.isnan().any()


GOOD: dict[str, Any] = dict(zip(Rows._fields, rows(Case(5, 4, 2, 6)), strict=True)) | {
    "sums": kernels.mixture_sums(4), "gram": torch.zeros(4, 4, dtype=torch.float64), "share": None
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"y": torch.ones(10, 6).double()}, "y: expected float32 or bfloat16 or float16, got float64"),
    "share": ({"share": torch.ones(5, 3)}, "share: expected K=2, got 3"),
    "gram": ({"gram": torch.zeros(4, 4)}, "gram: expected float64, got float32"),
    "order": ({"order": torch.zeros(10, dtype=torch.int64)}, "order: expected each slot of expert "),
    "offsets": ({"offsets": torch.tensor([0, 9, 3, 4, 10])}, "offsets: expected offsets rising from 0 to at most 10"),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("what", BAD)
def test_wrong_arguments_are_named(what: str, backend: str) -> None:
    change, error = BAD[what]
    args = GOOD | change
    places = [args.pop(name) for name in (*Rows._fields, "sums", "gram")]
    with pytest.raises(ValueError, match=rf"\[mixture_stats\] {error}"):
        kernels.mixture_stats(*places, **args, backend=backend)
