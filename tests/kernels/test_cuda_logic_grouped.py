"""CUDA kernels over rows grouped by expert, run on the CPU: see tests/helpers/cuda_on_cpu."""

from __future__ import annotations

import pytest
import torch

from moekern import _C, kernels
from moekern.kernels import native
from tests.helpers import cuda_on_cpu
from tests.helpers.grouped import (
    SIZES,
    Size,
    assert_energies_agree,
    assert_gram_agrees,
    assert_scattered_agrees,
    energies,
    gram,
    grouped,
    halves,
    inner_rows,
    scattered,
    started,
)
from tests.helpers.ops import DTYPES

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no g++")

TURNS = ((0, True), (1, False))  # orders of threads, and where arguments lie
SMALL = {**SIZES, "many channels": Size((21, 17), 300, 19, 30), "many rows": Size((530, 7), 9, 33, 540)}


@pytest.mark.parametrize("size", SMALL.values(), ids=SMALL)
def test_expert_gram_agrees_and_repeats(cuda: cuda_on_cpu.Extension, size: Size) -> None:
    args = grouped(size)
    want = gram(args, backend="reference")
    found = []
    for cuda.seed, cuda.at_end in TURNS:
        found.append(gram(args))
    assert_gram_agrees(found[0], want, args)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_without_a_mask_the_bits_are_the_cpu_s(cuda: cuda_on_cpu.Extension) -> None:
    args = grouped(Size((300, 5), 70, 40, 300))
    got, want = gram(args, masked=False), started(args)
    _C.expert_gram(args.a, args.r, args.tokens, args.offsets, None, want, 1, "", 0)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    r = args.r.clone()
    _C.scatter_residual(r, args.a, args.delta, args.tokens, args.offsets, 1, "", 0)
    assert torch.equal(scattered(args), r)


def test_either_product_is_left_out_with_the_same_bits(cuda: cuda_on_cpu.Extension) -> None:
    args = grouped(SIZES["odd"])
    want, (gram_alone, without) = gram(args), halves(args)
    assert torch.equal(gram_alone, want.gram)
    assert torch.equal(without, want.product)


@pytest.mark.parametrize("size", SMALL.values(), ids=SMALL)
def test_scatter_residual_agrees_and_repeats(cuda: cuda_on_cpu.Extension, size: Size) -> None:
    args = grouped(size)
    found = []
    for cuda.seed, cuda.at_end in TURNS:
        found.append(scattered(args))
    assert_scattered_agrees(found[0], scattered(args, backend="reference"), args)
    assert torch.equal(*found)


@pytest.mark.parametrize("size", SMALL.values(), ids=SMALL)
def test_gated_energy_agrees_and_repeats(cuda: cuda_on_cpu.Extension, size: Size) -> None:
    args = grouped(size)
    for dtype in DTYPES:
        rows = inner_rows(args, dtype)
        found = []
        for cuda.seed, cuda.at_end in TURNS:
            found.append(energies(rows, args))
        assert_energies_agree(found[0], energies(rows, args, backend="reference"), args)
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_more_chunks_than_slices(cuda: cuda_on_cpu.Extension) -> None:
    args = grouped(Size((2500,), 2, 1, 2500))
    rows = inner_rows(args, torch.float32)
    assert_energies_agree(energies(rows, args), energies(rows, args, backend="reference"), args)


def test_a_nan_of_a_row_that_does_not_count_is_not_read(cuda: cuda_on_cpu.Extension) -> None:
    args = grouped(SIZES["odd"])
    want = gram(args)
    args.a[~args.mask] = torch.nan
    assert all(torch.equal(x, y) for x, y in zip(gram(args), want, strict=True))


def test_wild_values_touch_nothing_else(cuda: cuda_on_cpu.Extension) -> None:
    """A GPU cannot check values without a wait: what is wrong stays inside the arguments."""
    args = grouped(SIZES["odd"])
    wild = torch.tensor([-(2**62), 2**62, -1, 64])[torch.arange(len(args.tokens)) % 4]
    for change in ({"tokens": wild}, {"offsets": torch.tensor([2**62, -5, 7, 3, 2**40])}):
        bad = args._replace(**change)
        sums, r = kernels.gram_sums(*args.delta.shape), args.r.clone()
        native.expert_gram(bad.a, bad.r, bad.offsets, bad.mask, sums, tokens=bad.tokens)
        native.scatter_residual(r, bad.a, bad.delta, bad.tokens, bad.offsets)
        energy = torch.zeros(len(args.offsets) - 1, args.a.shape[1], dtype=torch.float64)
        native.gated_energy(args.a, args.a.new_ones(len(args.a)), bad.offsets, None, energy)
        if "tokens" in change:
            assert torch.equal(r, args.r)
