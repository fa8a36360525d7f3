"""Weights, dense and stored, their sums in float64, and what every backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.kernels import WeightSums, weight_stats, weight_sums
from moekern.kernels.dequantize import dequantize
from moekern.kernels.quantised import Quantised, scaled
from tests.helpers.ops import U
from tests.helpers.stored import CASES, on

CHUNK, LANES = 2048, 32
# A chunk is summed in 32 lanes of 64, and the lanes in 5 steps; a square is rounded once before.
SUM = (CHUNK / LANES + 5 + 1) * U
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 64, 32), (2, 33, 97), (4, 1, 2049), (1, 130, 1030), (3, 0, 8), (3, 8, 0), (0, 4, 4)]


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def summed(weight: Tensor | Quantised, E: int, backend: str | None = None, device: str = "cpu") -> WeightSums:
    sums = weight_sums(E, device)
    weight_stats(weight.to(device) if isinstance(weight, Tensor) else on(device, weight), sums, backend=backend)
    return WeightSums(*(s.cpu() for s in sums))


def defined(dense: Tensor) -> WeightSums:
    """[E, R, C] in float64, expert by expert."""
    w = dense.double().flatten(1)
    top = w.abs().amax(1) if w.shape[1] else torch.zeros(len(w), dtype=torch.float64)
    return WeightSums(torch.full((len(w),), w.shape[1]), w.abs().sum(1), w.square().sum(1), top)


def assert_agree(got: WeightSums, want: WeightSums) -> None:
    assert torch.equal(got.count, want.count)
    assert torch.equal(got.max_abs, want.max_abs)
    torch.testing.assert_close(got.abs_sum, want.abs_sum, rtol=SUM, atol=0)
    torch.testing.assert_close(got.square_sum, want.square_sum, rtol=SUM, atol=0)


def equal(a: WeightSums, b: WeightSums) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_quantised_agrees(case: str, device: str, backend: str) -> None:
    weight, dense = CASES[case]()
    finite = dense.isfinite().all()
    got, want = summed(weight, 1, backend, device), defined(dense[None])
    if finite:
        assert_agree(got, want)
    assert got.max_abs.isfinite().item() is finite.item()


def assert_blocks_need_not_divide(device: str, backend: str) -> None:
    codes = weights(2, 150, 2100).mul(1e4).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, 17, generator=torch.Generator().manual_seed(1))
    weight = scaled(codes, scale, (128, 128))
    assert_agree(summed(weight, 2, backend, device), defined(dequantize(weight, torch.float32, backend="reference")))


def assert_nan_and_infinity_are_seen(at: int, dtype: torch.dtype, device: str, backend: str) -> None:
    w = weights(3, 1, 4099, dtype=dtype)
    w[1, 0, at] = torch.nan
    w[2, 0, at] = -torch.inf
    s = summed(w, 3, backend, device)
    for sum_ in s[1:]:
        assert sum_[0].isfinite()
        assert sum_[1].isnan()
        assert sum_[2] == torch.inf
    s = WeightSums(*(t.to(device) for t in s))
    weight_stats(torch.ones(3, 1, 1, device=device), s, backend=backend)
    assert s.max_abs.isnan().tolist() == [False, True, False]  # a NaN stays


def assert_a_nan_code_is_seen(backend: str) -> None:
    codes = torch.zeros(2, 3, 40, dtype=torch.uint8)
    codes[1, 2, 39] = 0x7F
    s = summed(scaled(codes.view(torch.float8_e4m3fn), torch.ones(1)), 2, backend)
    assert all(sum_.isnan().tolist() == [False, True] for sum_ in s[1:])
