import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekern import _C, kernels
from moekern.kernels import native
from tests.cases import EDGE, Case, Rows, grouped, router, rows

U = 2.0**-24  # half a unit in float32's last place: the error of one operation
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs(op: str) -> list[Any]:
    """Every backend on every device it serves: a new backend is tested by being there."""
    cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    others = [b for b in kernels.BACKENDS if b != "reference"]
    found = [pytest.param("cpu", b, id=f"cpu-{b}") for b in others if kernels.serves(b, op, "cpu")]
    for backend in others:
        if op not in kernels.MISSING.get((backend, "cuda"), ()):
            found.append(pytest.param("cuda", backend, marks=cuda, id=f"cuda-{backend}"))
    return found


def fitting(case: Case, device: str, backend: str) -> Case:
    """Triton's interpreter takes milliseconds a program, and each expert is some: fewer, but no power of two."""
    if (device, backend) != ("cpu", "triton") or case.E <= 100:
        return case
    return case._replace(T=min(case.T, 20), E=35, K=min(case.K, 6))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def to(device: str, args: Any) -> list[Tensor | None]:
    return [None if a is None else a.to(device) for a in args]


def routed(args: Any, E: int, device: str = "cpu", backend: str | None = None, score: str = "softmax") -> Any:
    sums = kernels.router_sums(E, device)
    kernels.router_stats(*to(device, args), sums, score=score, backend=backend)
    return kernels.RouterSums(*to("cpu", sums))


def combined(args: Any, E: int, H: int, device: str = "cpu", backend: str | None = None) -> Any:
    sums = kernels.expert_sums(E, H, device)
    out = kernels.combine_and_measure(*to(device, args), sums, backend=backend)
    return out.cpu(), kernels.ExpertSums(*to("cpu", sums))


def assert_router_sums_agree(got: Any, want: Any, args: Any, score: str) -> None:
    for name in ("tokens", "logit_tokens", "count", "top1_count", "coactivation"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.gate_sum, want.gate_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.gate_square_sum, want.gate_square_sum, rtol=1e-12, atol=0)
    T, E = args.logits.shape
    # exp and log are good to 4 ulp, x - max to |x - max| u; a row is summed in 32 lanes, a column over 256 tokens.
    row = (E / 32 + 64) * U
    largest = 1.0 if score in ("softmax", "sigmoid") else float(args.logits.abs().max()) if T else 0.0
    torch.testing.assert_close(got.score_sum, want.score_sum, rtol=row + 256 * U, atol=1e-30)
    torch.testing.assert_close(got.entropy_sum, want.entropy_sum, rtol=0, atol=T * row * (1 + math.log(E)))
    torch.testing.assert_close(got.margin_sum, want.margin_sum, rtol=0, atol=T * 2 * row * largest)


def assert_expert_sums_agree(got: Any, want: Any, H: int) -> None:
    assert torch.equal(got.max_abs, want.max_abs)
    # A row's squares are summed in 32 lanes, square_sum over 256 rows; both round each square once.
    for name in ("norm_sum", "norm_square_sum", "gated_norm_sum", "gated_norm_square_sum", "pair_sum"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=(H / 32 + 8) * U, atol=0, msg=name)
    torch.testing.assert_close(got.square_sum, want.square_sum, rtol=257 * U, atol=0)


@pytest.mark.parametrize(("device", "backend"), runs("router_stats"))
@pytest.mark.parametrize("score", kernels.SCORES)
@pytest.mark.parametrize("case", EDGE.values(), ids=EDGE)
def test_router_stats_agrees_with_the_reference(device: str, backend: str, score: str, case: Case) -> None:
    case = fitting(case, device, backend)
    args = router(case)
    if score == "identity":
        args = args._replace(logits=args.logits.softmax(1))
    want = routed(args, case.E, backend="reference", score=score)
    assert_router_sums_agree(routed(args, case.E, device, backend, score), want, args, score)


@pytest.mark.parametrize(("device", "backend"), runs("router_stats"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_router_stats_reads_every_dtype(device: str, backend: str, dtype: torch.dtype) -> None:
    case = fitting(EDGE["all"], device, backend)
    args = router(case, dtype)
    want = routed(args, case.E, backend="reference", score="sigmoid")
    assert_router_sums_agree(routed(args, case.E, device, backend, "sigmoid"), want, args, "sigmoid")


@pytest.mark.parametrize(("device", "backend"), runs("router_stats"))
@pytest.mark.parametrize("score", kernels.SCORES[:3])
def test_margin_when_the_chosen_are_not_the_largest(device: str, backend: str, score: str) -> None:
    args = router(Case(300, 40, 4, 1))
    shuffled = args._replace(topk_idx=torch.rand(300, 40).topk(4, dim=1).indices)
    want = routed(shuffled, 40, backend="reference", score=score)
    assert_router_sums_agree(routed(shuffled, 40, device, backend, score), want, args, score)
    assert torch.allclose(want.margin_sum, routed(args, 40, backend="reference", score=score).margin_sum)


@pytest.mark.parametrize(("device", "backend"), runs("router_stats"))
@pytest.mark.parametrize("score", kernels.SCORES[:3])
def test_extreme_logits_give_finite_sums(device: str, backend: str, score: str) -> None:
    ladder = torch.linspace(-120, 80, 201).roll(7)[None]
    masked = torch.where(torch.arange(201) % 3 == 0, -torch.inf, ladder)
    logits = torch.cat([ladder, masked, torch.zeros(1, 201), torch.full((1, 201), -30.0)])
    args = router(Case(4, 201, 8, 1))._replace(logits=logits)
    got = routed(args, 201, device, backend, score)
    assert all(s.isfinite().all() for s in got)
    assert_router_sums_agree(got, routed(args, 201, backend="reference", score=score), args, score)


@pytest.mark.parametrize(("device", "backend"), runs("router_stats"))
def test_without_logits_only_slots_are_counted(device: str, backend: str) -> None:
    case = fitting(EDGE["masked"], device, backend)
    args = router(case)
    whole = routed(args, case.E)
    got = routed(args._replace(logits=None), case.E, device, backend)
    assert got.tokens == whole.tokens
    assert torch.equal(got.coactivation, whole.coactivation)
    for name in ("logit_tokens", "score_sum", "entropy_sum", "margin_sum"):
        assert not getattr(got, name).any()


def test_router_stats_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(2), math.log(5)], [0.0, 0.0, 0.0]])
    idx, gate = torch.tensor([[2, 1], [0, 7]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    for backend in kernels.available()["router_stats"]["cpu"]:
        s = routed((logits, idx, gate, None), 3, backend=backend)
        assert s.count.tolist() == [1, 1, 1]
        assert s.top1_count.tolist() == [1, 0, 1]  # equal gates: the lower slot; empty slots never win
        assert s.coactivation.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
        assert s.gate_square_sum.tolist() == [0.0625, 0.25, 0.25]
        torch.testing.assert_close(s.score_sum, torch.tensor([1 / 8, 2 / 8, 5 / 8]).double() + 1 / 3)
        torch.testing.assert_close(s.margin_sum, torch.tensor([1 / 8]).double())
        entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)) + math.log(3)
        torch.testing.assert_close(s.entropy_sum, torch.tensor([entropy]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("device", "backend"), runs("combine_and_measure"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EDGE.values(), ids=EDGE)
def test_combine_and_measure_agrees_with_the_reference(
    device: str, backend: str, dtype: torch.dtype, case: Case
) -> None:
    case = fitting(case, device, backend)
    args = rows(case, dtype)
    out, got = combined(args, case.E, case.H, device, backend)
    want_out, want = combined(args, case.E, case.H, backend="reference")
    assert out.dtype == dtype
    assert torch.equal(out, want_out)  # the output is defined bit by bit
    assert_expert_sums_agree(got, want, case.H)


def test_combine_and_measure_by_hand() -> None:
    y = torch.tensor([[3.0, 4.0], [0.0, -2.0], [6.0, 8.0]])  # rows of experts 0, 1, 1
    weight, idx = torch.tensor([[0.5, 2.0], [1.0, 1.0]]), torch.tensor([[1, 0], [-1, 1]])
    args = (y, weight, idx, torch.tensor([1, 0, 3]), torch.tensor([0, 1, 3]), torch.tensor([True, True]))
    for backend in kernels.available()["combine_and_measure"]["cpu"]:
        out, s = combined(args, 2, 2, backend=backend)
        assert out.tolist() == [[6.0, 7.0], [6.0, 8.0]]
        assert s.norm_sum.tolist() == [5.0, 12.0]
        assert s.norm_square_sum.tolist() == [25.0, 104.0]
        assert s.gated_norm_sum.tolist() == [10.0, 11.0]
        assert s.gated_norm_square_sum.tolist() == [100.0, 101.0]
        assert s.max_abs.tolist() == [4.0, 8.0]
        assert s.pair_sum.tolist() == [[100.0, 10.0], [10.0, 101.0]]
        assert s.square_sum.tolist() == [[9.0, 16.0], [36.0, 68.0]]


@pytest.mark.parametrize(("device", "backend"), runs("combine_and_measure"))
def test_square_sum_is_optional(device: str, backend: str) -> None:
    case = fitting(EDGE["masked"], device, backend)
    args = rows(case, torch.bfloat16)
    (out, got), (whole, want) = (combined(args, case.E, H, device, backend) for H in (0, 97))
    assert torch.equal(out, whole)
    assert all(torch.equal(a, b) for a, b in zip(got[:-1], want[:-1], strict=True))
    assert got.square_sum.shape == (case.E, 0)


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


@pytest.mark.parametrize(("device", "backend"), runs("combine_and_measure"))
def test_two_runs_give_the_same_bits(device: str, backend: str) -> None:
    case = fitting(EDGE["all"], device, backend)
    for run in (
        lambda: routed(router(case), case.E, device, backend),
        lambda: (lambda out, sums: [out, *sums])(
            *combined(rows(case, torch.bfloat16), case.E, case.H, device, backend)
        ),
    ):
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("score", kernels.SCORES[:3])
@pytest.mark.parametrize("case", [EDGE["all"], EDGE["favourite"], Case(1500, 40, 4, 600)], ids=str)
def test_bits_depend_on_neither_threads_nor_instruction_set(score: str, case: Case) -> None:
    first = None
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for level in _C.levels():
            router_sums, expert_sums = kernels.router_sums(case.E), kernels.expert_sums(case.E, case.H)
            native.router_stats(*router(case), router_sums, score=score, level=level)
            out = native.combine_and_measure(*rows(case, torch.float16), expert_sums, level=level)
            got = [*router_sums, *expert_sums, out]
            first = first or got
            assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True)), (count, level)


SMALL = st.tuples(
    st.integers(0, 20), st.integers(1, 9), st.just(1), st.integers(1, 40), st.booleans(), st.booleans(), st.booleans()
)


@given(sizes=SMALL, K=st.integers(1, 9), cut=st.integers(0, 20), seed=st.integers(0, 99))
def test_two_batches_add_up_to_one(sizes: tuple[Any, ...], K: int, cut: int, seed: int) -> None:
    case = Case(*sizes)
    case, cut = case._replace(K=min(K, case.E)), min(cut, case.T)
    args, whole_rows = router(case, seed=seed), rows(case, seed=seed)
    halves = [slice(0, cut), slice(cut, case.T)]
    parts = kernels.router_sums(case.E), kernels.expert_sums(case.E, case.H)
    outs = []
    for half in halves:
        part = [None if a is None else a[half].contiguous() for a in args]
        kernels.router_stats(*part, parts[0])
        slots = torch.arange(case.T * case.K).view(case.T, case.K)[half].reshape(-1)
        mine = torch.isin(whole_rows.order, slots)
        order, offsets = grouped(part[1], case.E)
        batch = Rows(whole_rows.y[mine].contiguous(), part[2], part[1], order, offsets, part[3])
        outs.append(kernels.combine_and_measure(*batch, parts[1]))
    out, expert_sums = combined(whole_rows, case.E, case.H)
    assert torch.equal(torch.cat(outs), out)
    # float64 sums of float32 rows and of float32 chunks, which a cut divides
    for got, want in zip((*parts[0], *parts[1]), (*routed(args, case.E), *expert_sums), strict=True):
        torch.testing.assert_close(got, want, rtol=20 * U, atol=0)


@given(perm=st.permutations(range(6)), seed=st.integers(0, 99))
def test_renaming_experts_renames_their_sums(perm: list[int], seed: int) -> None:
    case = Case(30, 6, 3, 20, masked=True, empty=True)
    p = torch.tensor(perm)  # the expert called j was called p[j]
    new = torch.cat([p.argsort(), torch.tensor([8, 8, 8, -1])])
    args, old = router(case, seed=seed), rows(case, seed=seed)
    idx = new[args.topk_idx]
    renamed = args._replace(logits=args.logits[:, p].contiguous(), topk_idx=idx)
    order, offsets = grouped(idx, 6)
    row_of = torch.zeros(90, dtype=torch.int64).index_put_((old.order,), torch.arange(len(old.order)))
    moved = Rows(old.y[row_of[order]], old.topk_weight, idx, order, offsets, old.mask)
    out, sums = combined(old, 6, 20)
    new_out, new_sums = combined(moved, 6, 20)
    assert torch.equal(out, new_out)
    for before, after in zip((*routed(args, 6), *sums), (*routed(renamed, 6), *new_sums), strict=True):
        want = before if before.shape[0] == 1 else before[p][:, p] if before.shape == (6, 6) else before[p]
        torch.testing.assert_close(after, want, rtol=20 * U, atol=1e-5 if before.shape[0] == 1 else 0)


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
        native.combine_and_measure(*ROWS._replace(**change), kernels.expert_sums(4, 8))


def test_wrong_sums_scores_and_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[router_stats\] score: expected one of softmax, sigmoid, .*, got relu"):
        kernels.router_stats(*ROUTER, kernels.router_sums(4), score="relu")
    with pytest.raises(ValueError, match=r"\[router_stats\] coactivation: expected E=4, got 3"):
        kernels.router_stats(*ROUTER, kernels.router_sums(4)._replace(coactivation=torch.zeros(3, 3).long()))
    with pytest.raises(ValueError, match=r"\[router_stats\] gate_sum: expected float64, got float32"):
        kernels.router_stats(*ROUTER, kernels.router_sums(4)._replace(gate_sum=torch.zeros(4)))
    with pytest.raises(ValueError, match=r"\[router_stats\] level: expected an instruction set of this machine"):
        native.router_stats(*ROUTER, kernels.router_sums(4), score="softmax", level="sse9")


def test_a_model_being_trained_can_be_measured() -> None:
    out, _ = combined(ROWS._replace(y=ROWS.y.clone().requires_grad_()), 4, 8)
    assert not out.requires_grad
