"""What a caller of the kernels can get wrong, and that the message names it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekern import kernels
from moekern.kernels import native
from tests.helpers.cases import Case, router, rows
from tests.kernels.test_kernels import combined, routed


@pytest.mark.parametrize("backend", ["native", "reference"])
@given(bad=st.lists(st.integers(-(2**62), 2**62), min_size=3, max_size=3))
def test_wild_offsets_are_refused(backend: str, bad: list[int]) -> None:
    args = rows(Case(4, 2, 1, 8))
    if bad == args.offsets.tolist():
        return
    rising = bad[0] == 0 and bad == sorted(bad) and bad[2] <= 4  # but not where the experts' rows end
    what = (
        "(offsets|order): expected (a row for|each slot)" if rising else "offsets: expected offsets rising from 0 to at"
    )
    with pytest.raises(ValueError, match=rf"^\[combine_and_measure\] {what}"):
        combined(args._replace(offsets=torch.tensor(bad)), 2, 8, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
@given(row=st.integers(0, 7), slot=st.integers(-(2**62), 2**62) | st.integers(-1, 8))
def test_a_wild_order_is_refused(backend: str, row: int, slot: int) -> None:
    args = rows(Case(4, 3, 2, 8))
    order = args.order.clone()
    if order[row] == slot:
        return
    order[row] = slot
    with pytest.raises(ValueError, match=r"\[combine_and_measure\] order: expected each slot of expert \d once, got"):
        combined(args._replace(order=order), 3, 8, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_slot_without_a_row_is_refused(backend: str) -> None:
    args = rows(Case(4, 3, 2, 8))
    short = args._replace(y=args.y[:-1], order=args.order[:-1], offsets=args.offsets.clamp(max=7))
    with pytest.raises(ValueError, match=r"offsets: expected a row for each of 8 slots, got 7"):
        combined(short, 3, 8, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4), min_size=6, max_size=6))
def test_wild_ids_are_empty_slots(backend: str, ids: list[int]) -> None:
    args = router(Case(3, 4, 2, 1))._replace(topk_idx=torch.tensor(ids).view(3, 2))
    assert routed(args, 4, backend=backend).count.tolist() == [ids.count(e) for e in range(4)]


ROUTER, ROWS = router(Case(6, 4, 2, 8, masked=True)), rows(Case(6, 4, 2, 8, masked=True))
BAD_ROUTER = {
    "logits-width": ({"logits": torch.zeros(6, 3)}, "logits: expected E=4, got 3"),
    "logits-strides": ({"logits": torch.zeros(4, 6).T}, r"logits: expected a contiguous tensor, got strides \[1, 6\]"),
    "logits-dtype": ({"logits": torch.zeros(6, 4).double()}, "logits: expected float32 or bfloat16 or float16, got"),
    "logits-shape": ({"logits": torch.zeros(24)}, r"logits: expected shape \[T, E\], got \[24\]"),
    "weight": ({"topk_weight": torch.zeros(6, 3)}, "topk_weight: expected K=2, got 3"),
    "ids": ({"topk_idx": torch.zeros(6, 2)}, "topk_idx: expected int64 or int32, got float32"),
    "mask-length": ({"mask": torch.ones(5).bool()}, "mask: expected T=6, got 5"),
    "mask-dtype": ({"mask": torch.ones(6)}, "mask: expected bool, got float32"),
    "list": ({"topk_idx": [[0, 1]]}, "topk_idx: expected a tensor, got list"),
}
BAD_ROWS = {
    "offsets": ({"offsets": torch.zeros(4).long()}, r"offsets: expected E\+1=5, got 4"),
    "order": ({"order": torch.zeros(11).long()}, "order: expected N=12, got 11"),
    "order-dtype": ({"order": torch.zeros(12).int()}, "order: expected int64, got int32"),
    "strides": ({"y": torch.zeros(8, 12).T}, "y: expected a contiguous tensor"),
    "dtype": ({"y": torch.zeros(12, 8).long()}, "y: expected float32 or bfloat16 or float16, got int64"),
    "hidden": ({"y": torch.zeros(12, 9)}, "square_sum: expected H=9, got 8"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ROUTER.values(), ids=BAD_ROUTER)
def test_router_stats_names_the_wrong_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[router_stats\] " + message):
        kernels.router_stats(*ROUTER._replace(**change), kernels.router_sums(4))
    if "topk_idx" not in change:  # the extension checks for itself
        with pytest.raises(ValueError, match=r"^\[router_stats\] " + message.split(", got")[0].split(" or ")[0]):
            native.router_stats(*ROUTER._replace(**change), kernels.router_sums(4), score="softmax")


@pytest.mark.parametrize(("change", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_combine_and_measure_names_the_wrong_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[combine_and_measure\] " + message):
        kernels.combine_and_measure(*ROWS._replace(**change), kernels.expert_sums(4, 8))
    with pytest.raises(ValueError, match=r"^\[combine_and_measure\] " + message.split(", got")[0].split(" or ")[0]):
        native.combine_and_measure(*ROWS._replace(**change), None, kernels.expert_sums(4, 8))


BAD_RESIDUAL = {
    "tokens": (torch.zeros(5, 8), "expected T=6, got 5"),
    "width": (torch.zeros(6, 9), "expected H=8, got 9"),
    "dtype": (torch.zeros(6, 8).bfloat16(), "expected float32, got bfloat16"),
    "strides": (torch.zeros(8, 6).T, "expected a contiguous tensor"),
}


@pytest.mark.parametrize(("residual", "message"), BAD_RESIDUAL.values(), ids=BAD_RESIDUAL)
def test_a_wrong_residual_is_refused(residual: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[combine_and_measure\] residual: " + message):
        kernels.combine_and_measure(*ROWS, kernels.expert_sums(4, 8), residual=residual)
    with pytest.raises(ValueError, match=r"^\[combine_and_measure\] residual: " + message):
        native.combine_and_measure(*ROWS, residual, kernels.expert_sums(4, 8))


@pytest.mark.parametrize("name", ["square_sum", "value_sum", "unit_sum"])
def test_sums_of_dimensions_are_measured_together(name: str) -> None:
    sums = kernels.expert_sums(4, 8)._replace(**{name: torch.zeros(4, 0).double()})
    with pytest.raises(ValueError, match=r"^\[combine_and_measure\] (value_sum|unit_sum|square_sum): expected"):
        kernels.combine_and_measure(*ROWS, sums)


def test_wrong_sums_scores_and_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[router_stats\] score: expected one of softmax, sigmoid, .*, got relu"):
        kernels.router_stats(*ROUTER, kernels.router_sums(4), score="relu")
    with pytest.raises(ValueError, match=r"\[router_stats\] coactivation: expected E=4, got 3"):
        kernels.router_stats(*ROUTER, kernels.router_sums(4)._replace(coactivation=torch.zeros(3, 3).long()))
    with pytest.raises(ValueError, match=r"\[router_stats\] gate_sum: expected float64, got float32"):
        kernels.router_stats(*ROUTER, kernels.router_sums(4)._replace(gate_sum=torch.zeros(4)))
    with pytest.raises(ValueError, match=r"\[router_stats\] logit_gram: expected E=4, got 3"):
        kernels.router_stats(*ROUTER, kernels.router_sums(4)._replace(logit_gram=torch.zeros(3, 3).double()))
    with pytest.raises(ValueError, match=r"\[router_stats\] level: expected an instruction set of this machine"):
        native.router_stats(*ROUTER, kernels.router_sums(4), score="softmax", level="sse9")


def test_a_model_being_trained_can_be_measured() -> None:
    out, _ = combined(ROWS._replace(y=ROWS.y.clone().requires_grad_()), 4, 8)
    assert not out.requires_grad
