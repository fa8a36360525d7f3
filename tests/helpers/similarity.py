"""Outputs of experts, their sums over pairs, and what another order of additions may change of these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moekern import kernels
from tests.helpers.ops import U

# E, T, H: no token, one expert, one column, odd sizes, many experts, more than one block of columns, token groups
SHAPES = [(4, 0, 8), (1, 9, 33), (5, 1, 1), (7, 20, 97), (513, 3, 19), (12, 5, 600), (130, 70, 48), (3, 200, 7)]


def outputs(E: int, T: int, H: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows with something in common, some of them zero."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(1, T, H, generator=g) + torch.randn(E, T, H, generator=g)
    return (y * (torch.rand(E, T, 1, generator=g) > 0.1)).to(dtype)


def added(y: Tensor, mask: Tensor | None = None, device: str = "cpu", **options: Any) -> kernels.SimilaritySums:
    sums = kernels.similarity_sums(len(y), device)
    kernels.similarity(y.to(device), None if mask is None else mask.to(device), sums, **options)
    return kernels.SimilaritySums(*(s.cpu() for s in sums))


def product_error(H: int, device: str = "cpu") -> float:
    """Relative to the sum of |products|. On a CPU: their own rounding, 32 additions a lane, 3 to join, one a block.

    On a GPU: 64 fused multiply-adds a chain, then one addition for each chain.
    """
    return (64 + math.ceil(H / 64) if device == "cuda" else 1 + 32 + 3 + math.ceil(H / 256)) * U


def assert_agree(got: kernels.SimilaritySums, want: kernels.SimilaritySums, y: Tensor, device: str = "cpu") -> None:
    rows = y.double().abs().transpose(0, 1)
    size, each = (rows @ rows.mT).sum(0), product_error(y.shape[2], device)
    norm = rows.norm(dim=2)
    unit = rows / norm[:, :, None].clamp(min=1e-300)
    assert torch.equal(got.tokens, want.tokens)
    assert ((got.gram_sum - want.gram_sum).abs() <= each * size + 1e-30).all()
    # a cosine divides by two norms, each wrong by half its square's error: that makes one more product error
    slack = each * ((unit @ unit.mT).sum(0) + want.cosine_sum.abs().max() + len(rows))
    assert ((got.cosine_sum - want.cosine_sum).abs() <= slack).all()
    for matrix in got[1:]:
        assert torch.equal(matrix, matrix.T)
    assert torch.equal(got.cosine_sum.diagonal(), want.cosine_sum.diagonal())


def assert_sketches_agree(got: Sequence[Tensor], wanted: Sequence[Tensor], y: Tensor, device: str) -> None:
    (z, norm_square), (want, want_square), size = got, wanted, got[0].shape[2]
    each = product_error(y.shape[2], device) + 3 * U  # the scale, its rounding, the reference's own
    bound = each * y.double().abs().sum(2, keepdim=True) / size**0.5
    assert ((z.double() - want.double()).abs() <= bound + 1e-30).all()
    torch.testing.assert_close(norm_square, want_square, rtol=each, atol=0)
