"""router_stats: every backend against the reference, and the reference against sums by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekern import _C, kernels
from moekern.kernels import native
from tests.helpers.cases import EDGE, Case, router
from tests.helpers.ops import DTYPES, INTERPRETED, U, assert_router_sums_agree, fitting, routed, runs, to
from tests.helpers.pairwise import matrix


@matrix(runs("router_stats"), case=EDGE, score=kernels.SCORES)
def test_agrees_with_the_reference(device: str, backend: str, case: Case, score: str) -> None:
    case = fitting(case, device, backend)
    args = router(case)
    if score == "identity":
        args = args._replace(logits=args.logits.softmax(1))
    want = routed(args, case.E, backend="reference", score=score)
    assert_router_sums_agree(routed(args, case.E, device, backend, score), want, args, score)


@pytest.mark.parametrize(("device", "backend"), runs("router_stats"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_every_dtype(device: str, backend: str, dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize(("device", "backend"), runs("router_stats"))
def test_the_gram_is_optional(device: str, backend: str) -> None:
    case = fitting(EDGE["masked"], device, backend)
    args, sums = router(case), kernels.router_sums(case.E, device)
    kernels.router_stats(*to(device, args), sums, backend=backend)
    want = routed(args, case.E, device, backend)
    assert sums.logit_gram.shape == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(to("cpu", sums[:-1]), want[:-1], strict=True))


def test_by_hand() -> None:
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


@pytest.mark.parametrize(("device", "backend"), runs("router_stats"))
def test_two_runs_give_the_same_bits(device: str, backend: str) -> None:
    case = fitting(EDGE["all"], device, backend)
    first, second = (routed(router(case), case.E, device, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("score", kernels.SCORES[:3])
@pytest.mark.parametrize("case", [EDGE["all"], EDGE["favourite"], Case(1500, 40, 4, 1)], ids=str)
def test_bits_depend_on_neither_threads_nor_instruction_set(score: str, case: Case) -> None:
    first = None
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for level in _C.levels():
            sums = kernels.router_sums(case.E, gram=True)
            native.router_stats(*router(case), sums, score=score, level=level)
            first = first or sums
            assert all(torch.equal(a, b) for a, b in zip(sums, first, strict=True)), (count, level)


@given(
    T=st.integers(0, 20), E=st.integers(1, 9), K=st.integers(1, 9), masked=st.booleans(), empty=st.booleans(),
    favourite=st.booleans(), cut=st.integers(0, 20), seed=st.integers(0, 99),
)  # fmt: skip
def test_two_batches_add_up_to_one(
    T: int, E: int, K: int, masked: bool, empty: bool, favourite: bool, cut: int, seed: int
) -> None:
    args, parts = (
        router(Case(T, E, min(K, E), 1, masked, empty, favourite), seed=seed),
        kernels.router_sums(E, gram=True),
    )
    for half in (slice(0, min(cut, T)), slice(min(cut, T), T)):
        kernels.router_stats(*(None if a is None else a[half].contiguous() for a in args), parts)
    # float64 sums of float32 rows and of float32 chunks, which a cut divides; logits are at most 20
    for (name, want), got in zip(routed(args, E)._asdict().items(), parts, strict=True):
        atol = 20 * U * 20 * 20**2 if name == "logit_gram" else 0
        torch.testing.assert_close(got, want, rtol=20 * U, atol=atol)


@given(perm=st.permutations(range(6)), seed=st.integers(0, 99))
def test_renaming_experts_renames_their_sums(perm: list[int], seed: int) -> None:
    args = router(Case(30, 6, 3, 1, masked=True, empty=True), seed=seed)
    p = torch.tensor(perm)  # the expert called j was called p[j]
    new = torch.cat([p.argsort(), torch.tensor([8, 8, 8, -1])])
    renamed = args._replace(logits=args.logits[:, p].contiguous(), topk_idx=new[args.topk_idx])
    for before, after in zip(routed(args, 6), routed(renamed, 6), strict=True):
        want = before if before.shape[0] == 1 else before[p][:, p] if before.shape == (6, 6) else before[p]
        torch.testing.assert_close(after, want, rtol=20 * U, atol=1e-5 if before.shape[0] == 1 else 0)


@INTERPRETED
def test_many_experts_and_slots_on_the_interpreter() -> None:
    args = router(Case(5, 513, 22, 1, masked=True, empty=True, favourite=True))
    want = routed(args, 513, backend="reference")
    assert_router_sums_agree(routed(args, 513, backend="triton"), want, args, "softmax")


@INTERPRETED
@pytest.mark.parametrize(
    "score", [each if each == "sigmoid" else pytest.param(each, marks=pytest.mark.whole) for each in kernels.SCORES]
)
def test_scores_of_a_wide_router_on_the_interpreter(score: str) -> None:
    args = router(Case(9, 384, 8, 1))._replace(topk_idx=torch.full((9, 8), -1))  # no slot: logits only
    if score == "identity":
        args = args._replace(logits=args.logits.softmax(1))
    want, got = (routed(args, 384, backend=b, score=score, gram=False) for b in ("reference", "triton"))
    assert_router_sums_agree(got, want, args, score)


@pytest.mark.parametrize("backend", ["native", "reference"])
@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4), min_size=6, max_size=6))
def test_wild_ids_are_empty_slots(backend: str, ids: list[int]) -> None:
    args = router(Case(3, 4, 2, 1))._replace(topk_idx=torch.tensor(ids).view(3, 2))
    assert routed(args, 4, backend=backend).count.tolist() == [ids.count(e) for e in range(4)]


ROUTER = router(Case(6, 4, 2, 8, masked=True))
BAD = {
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


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_the_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[router_stats\] " + message):
        kernels.router_stats(*ROUTER._replace(**change), kernels.router_sums(4))
    if "topk_idx" not in change:  # the extension checks for itself
        with pytest.raises(ValueError, match=r"^\[router_stats\] " + message.split(", got")[0].split(" or ")[0]):
            native.router_stats(*ROUTER._replace(**change), kernels.router_sums(4), score="softmax")


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
