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
from tests.helpers.cases import EDGE, Case, Rows, grouped, router, rows, stream

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
    sums = kernels.router_sums(E, device, gram=True)
    kernels.router_stats(*to(device, args), sums, score=score, backend=backend)
    return kernels.RouterSums(*to("cpu", sums))


def combined(args: Any, E: int, H: int, device: str = "cpu", backend: str | None = None) -> Any:
    sums = kernels.expert_sums(E, H, device)
    residual = stream(Rows(*args)).to(device)
    out = kernels.combine_and_measure(*to(device, args), sums, residual=residual, backend=backend)
    return out.cpu(), kernels.ExpertSums(*to("cpu", sums))


def assert_within(got: Tensor, want: Tensor, atol: Tensor, name: str) -> None:
    near = ((got - want).abs() <= atol) | (got == want) | (got.isnan() & want.isnan())
    assert near.all(), f"{name}: off by up to {float((got - want).abs().max())}"


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
    norm = want.logit_gram.diagonal().sqrt()  # the magnitudes of a pair's products add up to at most norm_i norm_j
    assert_within(got.logit_gram, want.logit_gram, 257 * U * norm[:, None] * norm, "logit_gram")


def assert_expert_sums_agree(got: Any, want: Any, args: Rows, out: Tensor, row: float = 0.0) -> None:
    """`out` is the layer's output on all rows, as the reference gives it; `row` what a sum of squares is wrong by."""
    assert torch.equal(got.max_abs, want.max_abs)
    assert torch.equal(got.residual_tokens, want.residual_tokens)
    # A row's squares are summed in two sets of 16 lanes that take turns every 128 columns, dimensions over 256 rows;
    # both round each square once. A lane has at most 8 columns more than H / 32, and 5 sums join the lanes.
    row = row or (args.y.shape[1] / 32 + 14) * U
    for name in ("norm_sum", "norm_square_sum", "gated_norm_sum", "gated_norm_square_sum", "pair_sum"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=row, atol=0, msg=name)
    torch.testing.assert_close(got.square_sum, want.square_sum, rtol=257 * U, atol=0)
    # Of a dimension's values: at most √(n Σ y²) by Cauchy-Schwarz; of units: at most 1 each, which a norm divides.
    n = args.offsets.diff()[:, None].double()
    assert_within(got.value_sum, want.value_sum, 257 * U * (n * want.square_sum).sqrt(), "value_sum")
    assert_within(got.unit_sum, want.unit_sum, (259 * U + row) * n.expand_as(want.unit_sum), "unit_sum")
    turn = 2 * row * want.gated_norm_sum + turn_errors(args, out, row)
    assert_within(got.residual_sum, want.residual_sum, turn, "residual_sum")


def turn_errors(args: Rows, out: Tensor, row: float) -> Tensor:
    """What Σ a·(1 - cos) may be wrong by where the three dots are wrong by `row` of their magnitudes, [E].

    With κ = (|h| + |out|)² / |h + out|²: the determinant is wrong by 4·row·|h|²|out|² and |h + out|² by row·κ of it,
    so 1 - cos, at most 1 where the determinant is used and else 1 - <h, h + out> / (|h||h + out|), by 8·row·κ.
    """
    h, out = stream(args).double(), out.double()
    kappa = ((h.norm(dim=1) + out.norm(dim=1)) / (h + out).norm(dim=1)).square().nan_to_num(0)
    slot = args.order[: args.offsets[-1]]
    a = args.y[: len(slot)].double().norm(dim=1) * args.topk_weight.reshape(-1)[slot].double()
    expert = args.topk_idx.reshape(-1)[slot].long()
    error = a * (8 * row * kappa).clamp(max=2).repeat_interleave(args.topk_idx.shape[1])[slot]
    return torch.zeros(len(args.offsets) - 1, dtype=torch.float64).index_add(0, expert, error)


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
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # infinities, as NumPy sees them
def test_extreme_logits_give_finite_sums(device: str, backend: str, score: str) -> None:
    ladder = torch.linspace(-120, 80, 201).roll(7)[None]
    masked = torch.where(torch.arange(201) % 3 == 0, -torch.inf, ladder)
    logits = torch.cat([ladder, masked, torch.zeros(1, 201), torch.full((1, 201), -30.0)])
    args = router(Case(4, 201, 8, 1))._replace(logits=logits)
    got = routed(args, 201, device, backend, score)
    assert all(s.isfinite().all() for s in got[:-1])  # a logit of -inf has no product
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
        torch.testing.assert_close(s.logit_gram, torch.outer(*logits[[0, 0]].double()), rtol=3 * U, atol=0)


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
    assert_expert_sums_agree(got, want, args, want_out)


def test_combine_and_measure_by_hand() -> None:
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


@pytest.mark.parametrize(("device", "backend"), runs("router_stats"))
def test_the_gram_is_optional(device: str, backend: str) -> None:
    case = fitting(EDGE["masked"], device, backend)
    args, sums = router(case), kernels.router_sums(case.E, device)
    kernels.router_stats(*to(device, args), sums, backend=backend)
    want = routed(args, case.E, device, backend)
    assert sums.logit_gram.shape == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(to("cpu", sums[:-1]), want[:-1], strict=True))


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
            router_sums, expert_sums = kernels.router_sums(case.E, gram=True), kernels.expert_sums(case.E, case.H)
            native.router_stats(*router(case), router_sums, score=score, level=level)
            args = rows(case, torch.float16)
            out = native.combine_and_measure(*args, stream(args), expert_sums, level=level)
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
    halves, h = [slice(0, cut), slice(cut, case.T)], stream(whole_rows)
    parts = kernels.router_sums(case.E, gram=True), kernels.expert_sums(case.E, case.H)
    outs = []
    for half in halves:
        part = [None if a is None else a[half].contiguous() for a in args]
        kernels.router_stats(*part, parts[0])
        slots = torch.arange(case.T * case.K).view(case.T, case.K)[half].reshape(-1)
        mine = torch.isin(whole_rows.order, slots)
        order, offsets = grouped(part[1], case.E)
        batch = Rows(whole_rows.y[mine].contiguous(), part[2], part[1], order, offsets, part[3])
        outs.append(kernels.combine_and_measure(*batch, parts[1], residual=h[half]))
    out, expert_sums = combined(whole_rows, case.E, case.H)
    assert torch.equal(torch.cat(outs), out)
    # float64 sums of float32 rows and of float32 chunks, which a cut divides; logits and rows are below 20, units 1
    size = {"logit_gram": 20 * 20**2, "value_sum": 20 * 20, "unit_sum": 20}
    sums = {**routed(args, case.E)._asdict(), **expert_sums._asdict()}
    for (name, want), got in zip(sums.items(), (*parts[0], *parts[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=20 * U, atol=20 * U * size.get(name, 0))


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
