"""combine_and_measure: every backend against the reference, and the reference against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekern import _C, kernels
from moekern.kernels import native
from tests.helpers.cases import EDGE, Case, Rows, grouped, rows, stream
from tests.helpers.ops import (
    DTYPES,
    INTERPRETED,
    U,
    assert_expert_sums_agree,
    assert_within,
    combined,
    fitting,
    runs,
    to,
)  # fmt: skip
from tests.helpers.pairwise import matrix


@matrix(runs("combine_and_measure"), case=EDGE, dtype=DTYPES)
def test_agrees_with_the_reference(device: str, backend: str, case: Case, dtype: torch.dtype) -> None:
    case = fitting(case, device, backend)
    args = rows(case, dtype)
    out, got = combined(args, case.E, case.H, device, backend)
    want_out, want = combined(args, case.E, case.H, backend="reference")
    assert out.dtype == dtype
    assert torch.equal(out, want_out)  # the output is defined bit by bit
    assert_expert_sums_agree(got, want, args, want_out)


def test_by_hand() -> None:
    y = torch.tensor([[3.0, 4.0], [0.0, -2.0], [6.0, 8.0]])  # rows of experts 0, 1, 1
    weight, idx = torch.tensor([[0.5, 2.0], [1.0, 1.0]]), torch.tensor([[1, 0], [-1, 1]])
    args = (y, weight, idx, torch.tensor([1, 0, 3]), torch.tensor([0, 1, 3]), torch.tensor([True, True]))
    h = torch.tensor([[0.0, 0.0], [8.0, -6.0]])  # no direction; as long as the output and at a right angle to it
    for backend in kernels.available()["combine_and_measure"]["cpu"]:
        s = kernels.expert_sums(2, 2)
        out = kernels.combine_and_measure(*args, s, residual=h, backend=backend)
        assert out.tolist() == [[6.0, 7.0], [6.0, 8.0]]
        assert s.norm_sum.tolist() == [5.0, 12.0]
        assert s.norm_square_sum.tolist() == [25.0, 104.0]
        assert s.gated_norm_sum.tolist() == [10.0, 11.0]
        assert s.gated_norm_square_sum.tolist() == [100.0, 101.0]
        assert s.max_abs.tolist() == [4.0, 8.0]
        assert s.pair_sum.tolist() == [[100.0, 10.0], [10.0, 101.0]]
        assert s.square_sum.tolist() == [[9.0, 16.0], [36.0, 68.0]]
        assert s.value_sum.tolist() == [[3.0, 4.0], [6.0, 6.0]]
        unit = torch.tensor([[0.6, 0.8], [0.6, -0.2]]).double()
        torch.testing.assert_close(s.unit_sum, unit, rtol=0, atol=4 * U)
        turned = torch.tensor([10, 1 + 10 * (1 - 0.5**0.5)]).double()
        torch.testing.assert_close(s.residual_sum, turned, rtol=8 * U, atol=0)
        assert s.residual_tokens.tolist() == [2]


@pytest.mark.parametrize(("device", "backend"), runs("combine_and_measure"))
def test_sums_of_dimensions_are_optional(device: str, backend: str) -> None:
    case = fitting(EDGE["masked"], device, backend)
    args = rows(case, torch.bfloat16)
    (out, got), (whole, want) = (combined(args, case.E, H, device, backend) for H in (0, 97))
    assert torch.equal(out, whole)
    wide = {"square_sum", "value_sum", "unit_sum"}
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert a.shape == (case.E, 0) if name in wide else torch.equal(a, b), name


TURNS = [*runs("combine_and_measure"), pytest.param("cpu", "reference", id="cpu-reference")]


def turn(out: Tensor, residual: Tensor | None, device: str, backend: str) -> Any:
    """Sums of one expert that every token goes to with a gate of one: its rows are the output."""
    T, H = out.shape
    sums = kernels.expert_sums(1, 0, device)
    zeros = torch.zeros(T, 1, dtype=torch.int64)
    args = (out, torch.ones(T, 1), zeros, torch.arange(T), torch.tensor([0, T]), None)
    h = None if residual is None else residual.to(device)
    got = kernels.combine_and_measure(*to(device, args), sums, residual=h, backend=backend)
    assert torch.equal(got.cpu(), out)
    return kernels.ExpertSums(*to("cpu", sums))


@pytest.mark.parametrize(("device", "backend"), TURNS)
def test_turns_of_the_residual(device: str, backend: str) -> None:
    out = torch.randn(7, 45, generator=torch.Generator().manual_seed(3))
    for h, want in ((torch.zeros_like(out), 1), (-out, 1), (-3 * out, 0), (-out / 4, 2), (out, 0)):
        s = turn(out, h, device, backend)
        # Dots in fewer than 45 + 3 operations, of vectors up to twice as long together as their sum: κ = 4.
        error = 8 * 48 * U * 4 * s.gated_norm_sum
        assert_within(s.residual_sum, want * s.gated_norm_sum, error, "residual_sum")
        assert s.residual_sum >= 0
    without = turn(out, None, device, backend)
    assert not without.residual_sum.any()
    assert not without.residual_tokens.any()
    assert s.residual_tokens.tolist() == [7]


@pytest.mark.parametrize(("device", "backend"), TURNS)
def test_small_turns_keep_their_digits(device: str, backend: str) -> None:
    g = torch.Generator().manual_seed(4)
    h, out = torch.randn(1, 600, generator=g), torch.randn(1, 600, generator=g) * 2.0**-12
    s = turn(out, h, device, backend)
    a, b = h[0].double(), out[0].double()
    along = (a @ b) ** 2 / ((a @ a) * (b @ b))  # cos² of the angle between h and out
    want = b.norm() * (1 - a @ (a + b) / (a.norm() * (a + b).norm()))
    assert want < 1e-7 * b.norm()  # float32 has 1 - cos to no digit
    # The determinant keeps 1 - cos² of its magnitude; every other factor is wrong by less than one dot.
    torch.testing.assert_close(s.residual_sum[0], want, rtol=float((600 / 32 + 8) * U * (4 / (1 - along) + 4)), atol=0)


@pytest.mark.parametrize(("device", "backend"), TURNS)
def test_rows_of_zeros_have_no_direction(device: str, backend: str) -> None:
    y = torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, -4.0]])
    args = Rows(y, torch.ones(2, 1), torch.zeros(2, 1).long(), torch.arange(2), torch.tensor([0, 2]), None)
    _, s = combined(args, 1, 3, device, backend)
    torch.testing.assert_close(s.unit_sum, torch.tensor([[0.0, 0.6, -0.8]]).double(), rtol=3 * U, atol=0)


@pytest.mark.parametrize(("device", "backend"), runs("combine_and_measure"))
def test_a_nan_is_seen(device: str, backend: str) -> None:
    args = rows(EDGE["favourite"])
    args.y[3, 5] = torch.nan
    _, s = combined(args, 6, 64, device, backend)
    assert s.max_abs.isnan().tolist() == [True] + [False] * 5
    assert s.norm_sum.isnan().tolist() == [True] + [False] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_passes_unchanged(dtype: torch.dtype) -> None:
    y = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None]
    y = torch.where(y == 0, 0, y)  # 0 + -0 is 0
    one, zero = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    out, _ = combined((y, one, zero, zero[0], torch.tensor([0, 1]), None), 1, 0, backend="native")
    torch.testing.assert_close(out, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("device", "backend"), [*runs("combine_and_measure"), ("cpu", "reference")])
def test_rows_behind_the_last_expert_are_not_read(device: str, backend: str) -> None:
    args = rows(Case(30, 6, 3, 20, masked=True, empty=True))
    want_out, want = combined(args, 6, 20)
    order, offsets = kernels.sort_by_expert(args.topk_idx, 6)
    y = torch.full((len(order), 20), torch.nan)
    y[: offsets[-1]] = args.y
    out, got = combined(args._replace(y=y, order=order, offsets=offsets), 6, 20, device, backend)
    assert torch.equal(out, want_out)
    assert all(s.isfinite().all() for s in got)
    assert torch.equal(got.max_abs, want.max_abs)


@pytest.mark.parametrize(("device", "backend"), runs("combine_and_measure"))
def test_two_runs_give_the_same_bits(device: str, backend: str) -> None:
    case = fitting(EDGE["all"], device, backend)
    args = rows(case, torch.bfloat16)
    (out, sums), (again, more) = (combined(args, case.E, case.H, device, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip([out, *sums], [again, *more], strict=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", [EDGE["all"], EDGE["favourite"], Case(1500, 40, 4, 600)], ids=str)
def test_bits_depend_on_neither_threads_nor_instruction_set(case: Case) -> None:
    args, first = rows(case, torch.float16), None
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for level in _C.levels():
            sums = kernels.expert_sums(case.E, case.H)
            got = [native.combine_and_measure(*args, stream(args), sums, level=level), *sums]
            first = first or got
            assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True)), (count, level)


SMALL = st.tuples(
    st.integers(0, 20), st.integers(1, 9), st.just(1), st.integers(1, 40), st.booleans(), st.booleans(), st.booleans()
)


@given(sizes=SMALL, K=st.integers(1, 9), cut=st.integers(0, 20), seed=st.integers(0, 99))
def test_two_batches_add_up_to_one(sizes: tuple[Any, ...], K: int, cut: int, seed: int) -> None:
    case = Case(*sizes)
    case, cut = case._replace(K=min(K, case.E)), min(cut, case.T)
    whole = rows(case, seed=seed)
    h, parts, outs = stream(whole), kernels.expert_sums(case.E, case.H), []
    for half in (slice(0, cut), slice(cut, case.T)):
        gate, ids, mask = (None if a is None else a[half].contiguous() for a in (whole[1], whole[2], whole[5]))
        slots = torch.arange(case.T * case.K).view(case.T, case.K)[half].reshape(-1)
        mine = torch.isin(whole.order, slots)
        batch = Rows(whole.y[mine].contiguous(), gate, ids, *grouped(ids, case.E), mask)
        outs.append(kernels.combine_and_measure(*batch, parts, residual=h[half]))
    out, sums = combined(whole, case.E, case.H)
    assert torch.equal(torch.cat(outs), out)
    # float64 sums of float32 rows and of float32 chunks, which a cut divides; rows are below 20, units 1
    size = {"value_sum": 20 * 20, "unit_sum": 20}
    for (name, want), got in zip(sums._asdict().items(), parts, strict=True):
        torch.testing.assert_close(got, want, rtol=20 * U, atol=20 * U * size.get(name, 0))


@given(perm=st.permutations(range(6)), seed=st.integers(0, 99))
def test_renaming_experts_renames_their_sums(perm: list[int], seed: int) -> None:
    old = rows(Case(30, 6, 3, 20, masked=True, empty=True), seed=seed)
    p = torch.tensor(perm)  # the expert called j was called p[j]
    new = torch.cat([p.argsort(), torch.tensor([8, 8, 8, -1])])
    idx = new[old.topk_idx]
    order, offsets = grouped(idx, 6)
    row_of = torch.zeros(90, dtype=torch.int64).index_put_((old.order,), torch.arange(len(old.order)))
    moved = Rows(old.y[row_of[order]], old.topk_weight, idx, order, offsets, old.mask)
    (out, sums), (new_out, new_sums) = combined(old, 6, 20), combined(moved, 6, 20)
    assert torch.equal(out, new_out)
    for before, after in zip(sums, new_sums, strict=True):
        want = before if before.shape[0] == 1 else before[p][:, p] if before.shape == (6, 6) else before[p]
        torch.testing.assert_close(after, want, rtol=20 * U, atol=1e-5 if before.shape[0] == 1 else 0)


@INTERPRETED
@pytest.mark.parametrize("dimensions", [0, pytest.param(45, marks=pytest.mark.whole)])  # each expert takes milliseconds
def test_many_experts_and_slots_on_the_interpreter(dimensions: int) -> None:
    args = rows(Case(5, 513, 22, 45, masked=True, empty=True, favourite=True), torch.bfloat16)
    (out, got), (want_out, want) = (combined(args, 513, dimensions, backend=b) for b in ("triton", "reference"))
    assert torch.equal(out, want_out)
    assert_expert_sums_agree(got, want, args, want_out)


@INTERPRETED
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # infinities and NaN, as NumPy sees them
def test_bfloat16_is_rounded_to_nearest_even() -> None:
    halves = torch.arange(-(2**15), 2**15, 7).to(torch.int16).view(torch.bfloat16)[None]
    halves = halves.where(halves.float().abs() >= 2.0**-120, 0)  # the interpreter cannot read subnormals
    slot = torch.zeros(1, 1, dtype=torch.int64)
    for gate in (1.0, 1 + 2**-8, 1 / 3):  # nothing to round; many ties; anything
        args = (halves, torch.full((1, 1), gate), slot, slot[0], torch.tensor([0, 1]), None)
        (out, _), (want, _) = (combined(args, 1, 0, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


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


ROWS = rows(Case(6, 4, 2, 8, masked=True))
BAD = {
    "offsets": ({"offsets": torch.zeros(4).long()}, r"offsets: expected E\+1=5, got 4"),
    "order": ({"order": torch.zeros(11).long()}, "order: expected N=12, got 11"),
    "order-dtype": ({"order": torch.zeros(12).int()}, "order: expected int64, got int32"),
    "strides": ({"y": torch.zeros(8, 12).T}, "y: expected a contiguous tensor"),
    "dtype": ({"y": torch.zeros(12, 8).long()}, "y: expected float32 or bfloat16 or float16, got int64"),
    "hidden": ({"y": torch.zeros(12, 9)}, "square_sum: expected H=9, got 8"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_the_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
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


def test_a_model_being_trained_can_be_measured() -> None:
    out, _ = combined(ROWS._replace(y=ROWS.y.clone().requires_grad_()), 4, 8)
    assert not out.requires_grad
