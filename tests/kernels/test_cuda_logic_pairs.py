"""CUDA kernels over pairs of experts, token ids and stored weights, run on the CPU: see tests/helpers/cuda_on_cpu."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moekern import _C, kernels
from moekern.kernels import native, of_expert, weight_stats, weight_sums
from moekern.kernels.dequantize import dequantize
from moekern.kernels.quantised import BITS, Quantised, awq, gptq, mxfp4, pack_quantized, scaled
from tests.helpers import cuda_on_cpu, pairwise, similarity, stored, vocabulary, weights
from tests.helpers.cases import EDGE, Case, Rows, rows
from tests.helpers.mixture import assert_mixtures_agree, mixed
from tests.helpers.ops import DTYPES
from tests.helpers.stored import CASES, octets, positive, words

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no g++")

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
# E, T, H: the edges of tiles of 16, 32 and 64 experts, of 16 columns in shared memory and of chains of 64
SHAPES = [*similarity.SHAPES, (16, 3, 16), (17, 2, 64), (32, 2, 65), (33, 3, 15), (64, 1, 128), (65, 2, 17),
          (160, 2, 33), (3, 2, 0)]  # fmt: skip


def bits(result: Any) -> list[Tensor]:
    """Every tensor as integers, so that NaN equals NaN and 0 is not -0."""
    tensors = [result] if isinstance(result, Tensor) else list(result)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.view(integers[t.element_size()]) for t in tensors]


def assert_repeats(cuda: cuda_on_cpu.Extension, call: Callable[[], Any]) -> None:
    """The same bits for another order of threads and blocks, and for memory that lies otherwise."""
    first = None
    for cuda.seed, cuda.at_end in ((0, True), (1, False), (2, True)):
        got = bits(call())
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_similarity_agrees_with_the_reference(cuda: cuda_on_cpu.Extension, shape: Any, dtype: torch.dtype) -> None:
    y = similarity.outputs(*shape, dtype)
    for mask in (None, torch.arange(shape[1]) % 3 > 0, torch.zeros(shape[1]).bool()):
        got, want = (similarity.added(y, mask, backend=b) for b in ("native", "reference"))
        similarity.assert_agree(got, want, y, "cuda")


def test_more_tokens_than_products_fit(cuda: cuda_on_cpu.Extension) -> None:
    """45 tiles of 64 x 64 a token: 32 MiB hold 45 tokens."""
    y, mask = similarity.outputs(513, 47, 2), torch.ones(47).bool()
    mask[[3, 45]] = False
    got, want = (similarity.added(y, mask, backend=b) for b in ("native", "reference"))
    similarity.assert_agree(got, want, y, "cuda")


@pytest.mark.parametrize("shape", [(5, 9, 40), (20, 3, 70), (70, 3, 33)], ids=str)
def test_similarity_and_sketch_repeat_bit_for_bit(cuda: cuda_on_cpu.Extension, shape: Any) -> None:
    y = similarity.outputs(*shape, torch.bfloat16)
    mask = torch.arange(shape[1]) % 3 > 0
    assert_repeats(cuda, lambda: similarity.added(y, mask, backend="native"))
    assert_repeats(cuda, lambda: kernels.sketch(y, 70, start=60))


@SHARED
@given(cut=st.integers(0, 12), E=st.integers(1, 70), H=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_calls_may_cut_anywhere(cuda: cuda_on_cpu.Extension, cut: int, E: int, H: int, dtype: torch.dtype) -> None:
    y, parts = similarity.outputs(E, 12, H, dtype), kernels.similarity_sums(E)
    kernels.similarity(y[:, :cut].contiguous(), None, parts)
    kernels.similarity(y[:, cut:].contiguous(), None, parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, similarity.added(y), strict=True))
    whole = kernels.sketch(y, 5, start=58)
    halves = (
        kernels.sketch(y[:, :cut].contiguous(), 5, start=58),
        kernels.sketch(y[:, cut:].contiguous(), 5, start=58 + cut),
    )
    assert all(torch.equal(a, torch.cat(b, dim=1)) for a, b in zip(whole, zip(*halves, strict=True), strict=True))


def test_masked_tokens_are_not_read_and_a_nan_is_seen(cuda: cuda_on_cpu.Extension) -> None:
    for E in (5, 20, 70):
        y, mask = similarity.outputs(E, 6, 20), torch.tensor([True, False, True, True, False, True])
        want = similarity.added(y[:, mask].contiguous(), backend="native")
        y[:, ~mask] = torch.nan
        assert all(torch.equal(a, b) for a, b in zip(similarity.added(y, mask), want, strict=True))
        y[2, 3, 4] = torch.nan
        for matrix in similarity.added(y, mask)[1:]:
            assert matrix.isnan().any(1).all()
            assert matrix.isnan().sum() == 2 * E - 1


@pytest.mark.parametrize("size", [1, 21, 64, 65, 130])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 70, 33), (3, 5, 130), (1, 9, 0), (4, 0, 8)], ids=str)
def test_sketch_agrees_with_the_reference(cuda: cuda_on_cpu.Extension, shape: Any, size: int) -> None:
    for dtype in DTYPES:
        y = similarity.outputs(*shape, dtype)
        got, want = (kernels.sketch(y, size, seed=-7, start=2**40 + 37, backend=b) for b in ("native", "reference"))
        similarity.assert_sketches_agree(got, want, y, "cuda")


def test_sketched_norms_are_the_bits_of_the_gram_diagonal(cuda: cuda_on_cpu.Extension) -> None:
    for H in (16, 65, 300):
        y = similarity.outputs(20, 1, H)
        z, norm_square = kernels.sketch(y, 8)
        gram = similarity.added(y).gram_sum
        assert torch.equal(norm_square[:, 0].double(), gram.diagonal())
        sums = similarity.added(z, norm_square=norm_square)
        assert torch.equal(sums.gram_sum.diagonal(), gram.diagonal())
        assert torch.equal(sums.cosine_sum.diagonal(), (norm_square[:, 0] > 0).double())


@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 4, 2, 9), (50, 1, 1, 1), (300, 7, 3, 200), (90, 513, 6, 64), (40, 160, 22, 2100), (40, 33, 2, 65)]
)
def test_bits_are_the_sets_of_ids(cuda: cuda_on_cpu.Extension, shape: Any, ids: torch.dtype) -> None:
    for masked in (False, True):
        vocabulary.assert_bits_are_sets(shape, ids, masked, "cpu", "native")


def test_bits_repeat_and_unite(cuda: cuda_on_cpu.Extension) -> None:
    args = vocabulary.batch(400, 6, 3, 90)

    def seen() -> Any:
        found = kernels.vocabulary_bits(6, 90)
        kernels.vocabulary(*args, None, found)
        kernels.vocabulary(args[0] // 2, args[1], None, found)  # adds to what is there
        return found, kernels.popcount(found), kernels.pair_popcount(found)

    assert_repeats(cuda, seen)
    want = kernels.vocabulary_bits(6, 90)
    kernels.vocabulary(*args, None, want, backend="reference")
    kernels.vocabulary(args[0] // 2, args[1], None, want, backend="reference")
    assert torch.equal(seen()[0], want)


def test_wild_ids_touch_nothing(cuda: cuda_on_cpu.Extension) -> None:
    """Whatever a GPU's ids are, no word beside the expert's own is written; nothing may wait to tell of them."""
    for bad in (-1, 128, -(2**63), 2**63 - 1):
        found = kernels.vocabulary_bits(2, 100)
        kernels.vocabulary(torch.tensor([3, bad]), torch.tensor([[0, 2], [1, -1]]), None, found)
        assert found.tolist() == [[8, 0], [0, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*weights.SHAPES, (2, 3, 16385)], ids=str)
def test_dense_weights_agree_with_float64(cuda: cuda_on_cpu.Extension, shape: Any, dtype: torch.dtype) -> None:
    w = weights.weights(*shape, dtype=dtype)
    weights.assert_agree(weights.summed(w, shape[0], "native"), weights.defined(w))
    one_by_one = weight_sums(shape[0])
    for e in range(shape[0]):
        weight_stats(w[e], of_expert(one_by_one, e))
    assert weights.equal(one_by_one, weights.summed(w, shape[0], "native"))


@pytest.mark.parametrize("case", CASES)
def test_quantised_weights_agree_with_what_they_stand_for(cuda: cuda_on_cpu.Extension, case: str) -> None:
    weights.assert_quantised_agrees(case, "cpu", "native")
    weight = CASES[case]()[0]
    assert_repeats(cuda, lambda: weights.summed(weight, 1))


def test_blocks_that_do_not_divide_a_stack_of_many_tasks(cuda: cuda_on_cpu.Extension) -> None:
    weights.assert_blocks_need_not_divide("cpu", "native")
    dense = weights.weights(2, 41, 801)
    assert_repeats(cuda, lambda: weights.summed(dense, 2))


@pytest.mark.parametrize("at", [0, 31, 2048, 4098])
def test_nan_and_infinity_are_seen_where_they_are(cuda: cuda_on_cpu.Extension, at: int) -> None:
    for dtype in DTYPES:
        weights.assert_nan_and_infinity_are_seen(at, dtype, "cpu", "native")
    weights.assert_a_nan_code_is_seen("native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_dequantize_gives_the_cpu_s_bits(cuda: cuda_on_cpu.Extension, case: str, dtype: torch.dtype) -> None:
    stored.assert_defined(case, dtype, "cpu", "native")
    weight = CASES[case]()[0]
    assert_repeats(cuda, lambda: native.dequantize(weight, dtype))
    assert same_bits(weight, dtype, cuda)


def same_bits(weight: Quantised, dtype: torch.dtype, cuda: cuda_on_cpu.Extension) -> bool:
    """A NaN's sign and payload are the machine's where float32 is not rounded to a half."""
    out = torch.empty(len(weight.codes), weight.rows, weight.columns, dtype=dtype)
    _C.dequantize(native._stored(weight), out, 1, "", 0)
    got = native.dequantize(weight, dtype)
    finite = ~out.isnan()
    return torch.equal(got.isnan(), ~finite) and torch.equal(bits(got[finite])[0], bits(out[finite])[0])


def test_every_code_and_scale(cuda: cuda_on_cpu.Extension) -> None:
    stored.assert_every_float8_code("cpu", "native")
    stored.assert_every_power_of_two("cpu", "native")
    stored.assert_a_stack_is_its_experts("native")
    stored.assert_scales_of_every_shape("native")
    for sizes in ((0, 4, 32), (2, 0, 32), (2, 4, 0)):
        stored.assert_empty(*sizes, "native")


@SHARED
@given(
    layout=st.sampled_from(["e4m3", "mxfp4", "gptq", "awq", "packed"]), bits=st.sampled_from(BITS),
    R=st.integers(1, 40), C=st.integers(1, 70), block=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES), at_end=st.booleans(),
)  # fmt: skip
def test_any_shape_and_block_has_the_cpu_s_bits(
    cuda: cuda_on_cpu.Extension, layout: str, bits: int, R: int, C: int, block: tuple[int, int], dtype: torch.dtype,
    at_end: bool,
) -> None:  # fmt: skip
    cuda.at_end = at_end
    of_awq = 4 if bits < 8 else 8
    weight = {
        "e4m3": lambda: scaled(octets(2, R, C).view(torch.float8_e4m3fn),
                               positive(2, -(-R // block[0]), -(-C // block[1])), block),
        "mxfp4": lambda: mxfp4(octets(2, R, 2, 16), octets(2, R, 2)),
        "gptq": lambda: gptq(words(2, R, C), words(2, 4, -(-C * bits // 32)), positive(2, 4, C),
                             torch.randint(4, (2, 32 * R // bits), generator=torch.Generator().manual_seed(R)),
                             bits=bits),
        "awq": lambda: awq(words(2, R, C), words(2, 1, C), positive(2, 1, 32 // of_awq * C), bits=of_awq),
        "packed": lambda: pack_quantized(words(2, R, -(-C * bits // 32)), positive(2, R, 1), C,
                                         words(2, -(-R * bits // 32), 1), bits=bits),
    }[layout]()  # fmt: skip
    assert same_bits(weight, dtype, cuda)


@pytest.mark.parametrize("value", [-1, 4, -(2**31), 2**31 - 1])
def test_a_group_without_scales_is_nan_and_touches_nothing(cuda: cuda_on_cpu.Extension, value: int) -> None:
    """A CPU refuses it; a GPU would have to wait. gptq checks the groups that it is given."""
    good = stored.GOOD
    assert good.group is not None
    group = good.group.clone()
    group[0, 5] = value
    got, want = (dequantize(replace(good, group=g), torch.float32) for g in (group, good.group))
    assert got[:, 5].isnan().all()
    want[:, 5] = torch.nan
    assert stored.same(got, want)
    assert weights.summed(replace(good, group=group), 1).abs_sum.isnan().all()


@pairwise.matrix(None, case=EDGE, dtype=DTYPES)
def test_mixtures_agree_with_the_reference(cuda: cuda_on_cpu.Extension, case: Case, dtype: torch.dtype) -> None:
    case = case._replace(T=min(case.T, 90))  # a block is a token
    args = rows(case, dtype)
    got = mixed(args, case.E)
    assert_mixtures_agree(got, mixed(args, case.E, backend="reference"), args)
    assert torch.equal(got[1], got[1].T)


def test_mixtures_repeat_bit_for_bit_whatever_the_values(cuda: cuda_on_cpu.Extension) -> None:
    args = rows(EDGE["masked"]._replace(T=60))

    def of(some: Rows) -> list[Tensor]:
        sums, gram = mixed(some, EDGE["masked"].E)
        return [*sums, gram]

    assert_repeats(cuda, lambda: of(args))
    wild = args._replace(order=torch.full_like(args.order, 2**62), offsets=args.offsets * 2**40 - 5)
    of(wild)  # touches nothing outside the arguments


def test_a_mixture_of_more_slots_than_lanes_is_refused(cuda: cuda_on_cpu.Extension) -> None:
    with pytest.raises(ValueError, match=r"\[mixture_stats\] topk_idx: expected at most 32 slots on a GPU"):
        mixed(rows(Case(1, 40, 33, 2)), 40)
