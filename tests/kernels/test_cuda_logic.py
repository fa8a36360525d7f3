"""The CUDA kernels, run on the CPU: see tests/helpers/cuda_on_cpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekern import kernels
from moekern.kernels import native
from tests.helpers import cuda_on_cpu
from tests.helpers.cases import EDGE, Case, Router, Rows, router, rows, stream
from tests.helpers.ops import (
    DTYPES,
    WIDE,
    assert_expert_sums_agree,
    assert_router_sums_agree,
    by_hand,
    combined,
    routed,
)
from tests.helpers.pairwise import matrix

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no g++")


@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_sort_by_expert_gives_the_defined_permutation(cuda: cuda_on_cpu.Extension, case: Case) -> None:
    args = router(case)
    for mask in (None, args.mask) if case.masked else (None,):
        for cuda.seed in range(2):
            order, offsets = native.sort_by_expert(args.topk_idx, case.E, mask)
            assert (order.tolist(), offsets.tolist()) == by_hand(args.topk_idx, case.E, mask)


def routed_twice(cuda: cuda_on_cpu.Extension, args: Router, E: int, score: str = "softmax") -> kernels.RouterSums:
    """The sums on the CUDA side: the same bits whatever the threads' order and wherever the arguments lie."""
    found = []
    for cuda.seed, cuda.at_end in ((0, True), (1, False)):
        found.append(kernels.router_sums(E, gram=True))
        native.router_stats(*args, found[-1], score=score)
    assert same(*found)
    return found[0]


def combined_twice(cuda: cuda_on_cpu.Extension, args: Rows, E: int, H: int) -> tuple[Any, kernels.ExpertSums]:
    found = []
    for cuda.seed, cuda.at_end in ((0, True), (1, False)):
        sums = kernels.expert_sums(E, H)
        found.append((native.combine_and_measure(*args, stream(args), sums), sums))
    assert same(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[1][0])
    return found[0]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x.nan_to_num(-7), y.nan_to_num(-7)) for x, y in zip(a, b, strict=True))


@matrix(None, case=EDGE, score=kernels.SCORES)
def test_router_stats_agrees_with_the_reference(cuda: cuda_on_cpu.Extension, case: Case, score: str) -> None:
    args = router(case._replace(T=min(case.T, 150)))  # more than a block
    if score == "identity":
        args = args._replace(logits=args.logits.softmax(1))
    want = routed(args, case.E, backend="reference", score=score)
    assert_router_sums_agree(routed_twice(cuda, args, case.E, score), want, args, score)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "E"), [(20, 1024), (600, 72)])
def test_router_stats_reads_every_dtype(cuda: cuda_on_cpu.Extension, dtype: torch.dtype, T: int, E: int) -> None:
    args = router(Case(T, E, 4, 1, masked=True), dtype)  # whole runs of four columns; three slices of the Gram matrix
    want = routed(args, E, backend="reference", score="sigmoid")
    assert_router_sums_agree(routed_twice(cuda, args, E, "sigmoid"), want, args, "sigmoid")


def test_margin_when_the_chosen_are_not_the_largest(cuda: cuda_on_cpu.Extension) -> None:
    args = router(Case(60, 40, 4, 1))
    args.logits[3], args.logits[4, :20] = 1.5, 0.25  # ties
    shuffled = args._replace(topk_idx=torch.rand(60, 40).topk(4, dim=1).indices)
    for score in ("softmax", "sqrtsoftplus"):
        want = routed(shuffled, 40, backend="reference", score=score)
        assert_router_sums_agree(routed_twice(cuda, shuffled, 40, score), want, shuffled, score)


def test_extreme_logits_give_finite_sums(cuda: cuda_on_cpu.Extension) -> None:
    ladder = torch.linspace(-120, 80, 201).roll(7)[None]
    masked = torch.where(torch.arange(201) % 3 == 0, -torch.inf, ladder)
    args = router(Case(3, 201, 8, 1))._replace(logits=torch.cat([ladder, masked, torch.full((1, 201), -30.0)]))
    for score in kernels.SCORES[:3]:
        got, want = routed_twice(cuda, args, 201, score), routed(args, 201, backend="reference", score=score)
        assert all(s.isfinite().all() for s in got[:-1])
        assert_router_sums_agree(got, want, args, score)


def test_without_logits_only_slots_are_counted(cuda: cuda_on_cpu.Extension) -> None:
    args = router(EDGE["masked"])
    whole, got = routed(args, 160), routed_twice(cuda, args._replace(logits=None), 160)  # type: ignore[arg-type]
    assert got.tokens == whole.tokens
    assert torch.equal(got.coactivation, whole.coactivation)
    assert not any(getattr(got, name).any() for name in ("logit_tokens", "score_sum", "entropy_sum", "logit_gram"))


def test_equal_gates_and_equal_ids(cuda: cuda_on_cpu.Extension) -> None:
    """Of equal gates the lowest slot is top-1; of equal ids each is counted, and they make no pair."""
    idx = torch.tensor([[2, 1, -1], [3, 3, 0], [5, 0, 1]])
    gate = torch.tensor([[0.5, 0.5, 0.9], [0.25, 0.5, 0.25], [0.7, 0.2, 0.2]])
    got = routed_twice(cuda, Router(torch.zeros(3, 4), idx, gate, None), 4)
    assert got.top1_count.tolist() == [1, 0, 1, 1]
    assert got.count.tolist() == [2, 2, 1, 2]
    assert got.gate_square_sum.tolist() == pytest.approx([0.1025, 0.29, 0.25, 0.3125], rel=1e-6)
    assert got.coactivation.tolist() == [[2, 1, 0, 2], [1, 2, 1, 0], [0, 1, 1, 0], [2, 0, 0, 2]]


@matrix(None, case=EDGE, dtype=DTYPES)
def test_combine_and_measure_agrees_with_the_reference(
    cuda: cuda_on_cpu.Extension, case: Case, dtype: torch.dtype
) -> None:
    case = case._replace(T=min(case.T, 1200 // case.K))
    args = rows(case, dtype)
    out, got = combined_twice(cuda, args, case.E, case.H)
    want_out, want = combined(args, case.E, case.H, backend="reference")
    assert torch.equal(out, want_out)
    assert_expert_sums_agree(got, want, args, want_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_loads_and_panels(cuda: cuda_on_cpu.Extension, dtype: torch.dtype) -> None:
    """Rows of whole 16-byte loads, more columns than a block has at once, more rows than a chunk."""
    for case in (Case(20, 5, 2, 4608), Case(290, 3, 2, 64, masked=True, favourite=True)):
        args = rows(case, dtype)
        out, got = combined_twice(cuda, args, case.E, case.H)
        want_out, want = combined(args, case.E, case.H, backend="reference")
        assert torch.equal(out, want_out)
        assert_expert_sums_agree(got, want, args, want_out)


def test_dimensions_and_the_residual_are_optional(cuda: cuda_on_cpu.Extension) -> None:
    args, sums, whole = rows(EDGE["all-chosen"]), kernels.expert_sums(5), kernels.expert_sums(5, 33)
    out = native.combine_and_measure(*args, None, sums)
    assert torch.equal(out, native.combine_and_measure(*args, stream(args), whole))
    assert same(sums[:6], whole[:6])
    assert not sums.residual_sum.any()
    assert not sums.residual_tokens.any()


def test_a_nan_is_seen(cuda: cuda_on_cpu.Extension) -> None:
    args = rows(EDGE["favourite"]._replace(T=40))
    args.y[3, 5] = torch.nan
    s = kernels.expert_sums(6, 64)
    native.combine_and_measure(*args, stream(args), s)
    assert s.max_abs.isnan().tolist() == [True] + [False] * 5
    assert s.norm_sum.isnan().tolist() == [True] + [False] * 5
    assert s.square_sum.isnan().nonzero().tolist() == [[0, 5]]


def test_two_batches_add_up(cuda: cuda_on_cpu.Extension) -> None:
    args, batch = router(EDGE["all-chosen"]), rows(EDGE["all-chosen"])
    routing, experts = kernels.router_sums(5, gram=True), kernels.expert_sums(5, 33)
    for _ in range(2):
        native.router_stats(*args, routing, score="softmax")
        native.combine_and_measure(*batch, stream(batch), experts)
    once = combined_twice(cuda, batch, 5, 33)[1]
    twice = [one if name == "max_abs" else 2 * one for name, one in once._asdict().items()]
    assert same(experts, twice)
    assert same(routing, [2 * one for one in routed_twice(cuda, args, 5)])


def test_rows_behind_the_last_expert_and_wild_values_touch_nothing_else(cuda: cuda_on_cpu.Extension) -> None:
    """A GPU cannot check values without a wait: what is wrong stays inside the arguments."""
    args = rows(Case(30, 6, 3, 20, masked=True, empty=True))
    want = combined(args, 6, 20)
    order, offsets = native.sort_by_expert(args.topk_idx, 6, None)
    y = torch.full((len(order), 20), torch.nan)
    y[: offsets[-1]] = args.y
    out, got = combined_twice(cuda, args._replace(y=y, order=order, offsets=offsets), 6, 20)
    assert torch.equal(out, want[0])
    assert_expert_sums_agree(got, want[1], args, want[0])
    wild = args.order.clone()
    wild[::2] = torch.tensor([-(2**62), 2**62, -1, 90])[torch.arange(len(wild[::2])) % 4]
    for change in ({"order": wild}, {"offsets": torch.tensor([2**62, -5, 7, 3, 2**40, -1, 2**50])}):
        native.combine_and_measure(*args._replace(**change), None, kernels.expert_sums(6, 20))


def test_what_a_gpu_does_not_take_is_refused(cuda: cuda_on_cpu.Extension) -> None:
    for case, what in (
        (Case(2, 1025, 2, 1), "count: expected at most 1024"),
        (Case(2, 40, 33, 1), "topk_idx: expected at"),
    ):
        with pytest.raises(ValueError, match=rf"^\[router_stats\] {what}"):
            native.router_stats(*router(case), kernels.router_sums(case.E), score="softmax")
