"""sort_by_expert: every backend against a definition in plain Python."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekern import kernels
from tests.helpers.cases import Case, router
from tests.helpers.ops import WIDE, by_hand, runs

OP = "sort_by_expert"


@pytest.mark.parametrize(("device", "backend"), [*runs(OP), ("cpu", "reference")])
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_every_backend_gives_the_defined_permutation(device: str, backend: str, case: Case) -> None:
    if (device, backend) == ("cpu", "triton"):
        case = case._replace(T=min(case.T, 4200 // case.K))  # 5 blocks of slots, or 12: the interpreter is slow
    args = router(case)
    for mask in (None, args.mask) if case.masked else (None,):
        given = None if mask is None else mask.to(device)
        order, offsets = kernels.sort_by_expert(args.topk_idx.to(device), case.E, given, backend=backend)
        assert order.dtype == offsets.dtype == torch.int64
        assert (order.tolist(), offsets.tolist()) == by_hand(args.topk_idx, case.E, mask)


@pytest.mark.parametrize("backend", ["native", "reference"])
@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 5), max_size=24),
    E=st.integers(0, 5),
    masked=st.booleans(),
)
def test_wild_ids_have_no_expert(backend: str, ids: list[int], E: int, masked: bool) -> None:
    topk_idx = torch.tensor(ids[: len(ids) // 2 * 2], dtype=torch.int64).view(-1, 2)
    mask = torch.arange(len(topk_idx)) % 3 > 0 if masked else None
    order, offsets = kernels.sort_by_expert(topk_idx, E, mask, backend=backend)
    assert (order.tolist(), offsets.tolist()) == by_hand(topk_idx, E, mask)


@pytest.mark.usefixtures("threads")
def test_the_permutation_does_not_depend_on_threads() -> None:
    topk_idx = router(Case(20000, 160, 8, 1, empty=True)).topk_idx  # enough slots for four threads
    want = kernels.sort_by_expert(topk_idx, 160, backend="reference")
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(kernels.sort_by_expert(topk_idx, 160), want, strict=True))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"topk_idx": torch.zeros(4).long()}, r"topk_idx: expected shape \[T, K\], got \[4\]"),
    "dtype": ({"topk_idx": torch.zeros(4, 2)}, "topk_idx: expected int64 or int32, got float32"),
    "mask": ({"mask": torch.ones(3).bool()}, "mask: expected T=4, got 3"),
    "experts": ({"num_experts": -1}, "num_experts: expected 0 or more, got -1"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"topk_idx": torch.zeros(4, 2).long(), "num_experts": 3, "mask": None, **change}
    with pytest.raises(ValueError, match=r"^\[sort_by_expert\] " + message):
        kernels.sort_by_expert(**arguments)
