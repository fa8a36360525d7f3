"""similarity and sketch against the reference, and what makes them what they are."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekern import _C, kernels
from moekern.kernels import native, reference
from tests.helpers.ops import DTYPES, runs
from tests.helpers.similarity import SHAPES, added, assert_agree, assert_sketches_agree, outputs, product_error


@pytest.mark.parametrize(("device", "backend"), runs("similarity"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_similarity_agrees_with_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, backend: str
) -> None:
    y = outputs(*shape, dtype)
    assert_agree(added(y, device=device, backend=backend), added(y, backend="reference"), y, device)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_by_hand(backend: str) -> None:
    y = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[4.0, 3.0], [0.0, 0.0]]])
    sums = added(y, backend=backend)
    assert sums.tokens.tolist() == [2]
    assert sums.gram_sum.tolist() == [[26.0, 24.0], [24.0, 25.0]]
    torch.testing.assert_close(
        sums.cosine_sum, torch.tensor([[2.0, 0.96], [0.96, 1.0]], dtype=torch.float64), rtol=1e-15, atol=0
    )
    assert kernels.distance_sum(sums).tolist() == [[0.0, 3.0], [3.0, 0.0]]  # 1 + 1 of the first token, 1 of the second


@pytest.mark.parametrize(("device", "backend"), [*runs("similarity"), ("cpu", "reference")])
def test_masked_tokens_do_not_count(device: str, backend: str) -> None:
    y, mask = outputs(6, 50, 40), torch.arange(50) % 3 > 0
    got = added(y, mask, device, backend=backend)
    want = added(y[:, mask].contiguous(), device=device, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@given(cut=st.integers(0, 40), E=st.integers(1, 14), H=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_calls_may_cut_anywhere(cut: int, E: int, H: int, dtype: torch.dtype) -> None:
    y, parts = outputs(E, 40, H, dtype), kernels.similarity_sums(E)
    kernels.similarity(y[:, :cut].contiguous(), None, parts)
    kernels.similarity(y[:, cut:].contiguous(), None, parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, added(y), strict=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(130, 70, 48), (12, 5, 600), (513, 3, 19)], ids=str)
def test_bits_depend_on_neither_threads_nor_instruction_set(shape: tuple[int, int, int]) -> None:
    y, first = outputs(*shape, torch.bfloat16), None
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for level in _C.levels():
            sums = kernels.similarity_sums(shape[0])
            native.similarity(y, None, None, sums, level=level)
            got = [*sums, *native.sketch(y, 10, seed=3, start=60, level=level)]
            first = first or got
            assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True)), (count, level)


@given(perm=st.permutations(range(6)))
def test_renaming_experts_renames_their_sums(perm: list[int]) -> None:
    y, p = outputs(6, 20, 30), torch.tensor(perm)
    before, after = added(y), added(y[p].contiguous())
    for a, b in zip(before[1:], after[1:], strict=True):
        torch.testing.assert_close(a[p][:, p], b, rtol=1e-14, atol=1e-14)  # products commute: only the cosine's scales


def test_a_nan_is_seen() -> None:
    y = outputs(5, 8, 16)
    y[2, 3, 4] = torch.nan
    for sums in (added(y, backend="native"), added(y, backend="reference")):
        for matrix in sums[1:]:
            assert matrix.isnan().any(1).all()
            assert matrix.isnan().sum() == 9


@pytest.mark.parametrize(("device", "backend"), runs("sketch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sketch_agrees_with_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, backend: str
) -> None:
    y = outputs(*shape, dtype)
    got = [t.cpu() for t in kernels.sketch(y.to(device), 21, seed=-7, start=37, backend=backend)]
    assert_sketches_agree(got, kernels.sketch(y, 21, seed=-7, start=37, backend="reference"), y, device)


@given(cut=st.integers(0, 150), start=st.integers(0, 200))
def test_a_sketch_depends_on_positions_alone(cut: int, start: int) -> None:
    y = outputs(2, 150, 9)
    z, norm_square = kernels.sketch(y, 5, start=start)
    parts = [kernels.sketch(y[:, :cut].contiguous(), 5, start=start),
             kernels.sketch(y[:, cut:].contiguous(), 5, start=start + cut)]  # fmt: skip
    assert torch.equal(z, torch.cat([p[0] for p in parts], dim=1))
    assert torch.equal(norm_square, torch.cat([p[1] for p in parts], dim=1))
    alone = kernels.sketch(y[1:].contiguous(), 5, start=start)
    assert torch.equal(alone[0], z[1:])


def test_projections_are_independent_signs() -> None:
    drawn = torch.stack([reference.signs(64, 100, seed, chunk) for seed in (0, 1, -1) for chunk in (0, 1, 2)])
    assert (drawn.abs() == 1).all()
    rows = drawn.reshape(-1, 100)
    n, pairs = rows.numel(), len(rows) * (len(rows) - 1) / 2
    assert abs(float(rows.sum())) <= 6 * n**0.5  # a sum of n signs; six standard deviations are 2 in 10^9
    largest = float((rows @ rows.T).fill_diagonal_(0).abs().max())
    assert largest <= math.sqrt(2 * 100 * math.log(2 * pairs / 1e-9))  # Hoeffding's bound, over all pairs of rows


@pytest.mark.parametrize("seed", [0, 1])
def test_sketched_similarity_is_unbiased_within_its_bound(seed: int) -> None:
    E, T, H, size = 8, 1280, 200, 64
    y = outputs(E, T, H, torch.bfloat16, seed)
    z, norm_square = kernels.sketch(y, size, seed=seed)
    got, want = added(z, norm_square=norm_square), added(y)
    torch.testing.assert_close(got.gram_sum.diagonal(), want.gram_sum.diagonal(), rtol=product_error(H) * 2, atol=0)
    assert torch.equal(got.cosine_sum.diagonal(), want.cosine_sum.diagonal())
    # Tokens of one chunk share their errors' projection, so its sum is at worst 64 times one token's; chunks add in
    # squares. Six standard deviations; Chebyshev alone would allow 1 in 36, the sums of 20 chunks are close to normal.
    bound = 6 * math.sqrt(2 / size) * 64 * math.sqrt(T / 64)
    error = (got.cosine_sum - want.cosine_sum).abs()
    assert float(error.max()) <= bound
    assert float(error.max()) > 0


def test_one_pair_s_error_has_the_stated_deviation() -> None:
    H, size, n = 128, 32, 2000
    x = torch.randn(2, 1, H, generator=torch.Generator().manual_seed(0))
    y = x.expand(2, n * 64, H)[:, ::64]  # the same pair under n projections: one token a chunk
    z = torch.cat([kernels.sketch(y[:, i : i + 1].contiguous(), size, start=64 * i)[0] for i in range(n)], dim=1)
    a, b = x[:, 0].double()
    cosine = float(a @ b / (a.norm() * b.norm()))
    found = (z[0].double() * z[1].double()).sum(1) / (a.norm() * b.norm())
    bound = math.sqrt((1 + cosine**2) / size)
    # ±1 removes 2 Σ a²b² from the Gaussian variance. Mean and variance of n draws, six standard errors each (a
    # fourth moment of at most 4 variances², generous for a sum of 32).
    exact = bound**2 - 2 * float((a**2 * b**2).sum() / (a.norm() * b.norm()) ** 2) / size
    assert abs(float(found.mean()) - cosine) <= 6 * math.sqrt(exact / n)
    assert abs(float(found.var()) - exact) <= 6 * exact * math.sqrt(3 / n)
    assert exact <= bound**2


Y = outputs(4, 6, 8)
BAD = {
    "dtype": (Y.double(), None, {}, "y: expected float32 or bfloat16 or float16, got float64"),
    "shape": (Y[0], None, {}, r"y: expected shape \[E, T, H\], got \[6, 8\]"),
    "strides": (Y.transpose(0, 1).contiguous().transpose(0, 1), None, {}, "y: expected a contiguous tensor"),
    "experts": (Y[:3].contiguous(), None, {}, "gram_sum: expected E=3, got 4"),
    "mask": (Y, torch.ones(5).bool(), {}, "mask: expected T=6, got 5"),
    "mask-dtype": (Y, torch.ones(6), {}, "mask: expected bool, got float32"),
    "norms": (Y, None, {"norm_square": torch.ones(4, 5)}, "norm_square: expected T=6, got 5"),
}


@pytest.mark.parametrize(("y", "mask", "options", "message"), BAD.values(), ids=BAD)
def test_similarity_names_the_wrong_argument(y: Tensor, mask: Any, options: Any, message: str) -> None:
    sums = kernels.similarity_sums(4)
    with pytest.raises(ValueError, match=r"^\[similarity\] " + message):
        kernels.similarity(y, mask, sums, **options)
    with pytest.raises(ValueError, match=r"^\[similarity\] " + message.split(", got")[0]):
        native.similarity(y, options.get("norm_square"), mask, sums)
    assert not any(s.any() for s in sums)


def test_sketch_names_the_wrong_argument() -> None:
    with pytest.raises(ValueError, match=r"^\[sketch\] size: expected 1 or more, got 0"):
        kernels.sketch(Y, 0)
    with pytest.raises(ValueError, match=r"^\[sketch\] start: expected 0 or more, got -1"):
        kernels.sketch(Y, 4, start=-1)
    with pytest.raises(ValueError, match=r"^\[sketch\] seed: expected a signed 64-bit integer"):
        kernels.sketch(Y, 4, seed=2**63)
    with pytest.raises(NotImplementedError, match=r"\[similarity\] backend: expected one of .* on cpu, got triton"):
        kernels.similarity(Y, None, kernels.similarity_sums(4), backend="triton")
