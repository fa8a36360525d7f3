"""Rows grouped by expert for the ops of a refit, and what another order of additions may change of their results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekern import kernels
from tests.helpers.ops import U, assert_within


class Size(NamedTuple):
    """Rows of each expert, channels, columns, tokens."""

    rows: tuple[int, ...]
    M: int
    H: int
    T: int


SIZES = {
    "one": Size((1,), 1, 1, 1),
    "odd": Size((37, 0, 5, 61), 13, 45, 64),
    "no rows": Size((0, 0), 5, 7, 3),
    "no experts": Size((), 5, 7, 3),
    "no channels": Size((3, 4), 0, 7, 5),
    "no columns": Size((3, 4), 5, 0, 5),
    "many rows": Size((1030, 7), 9, 33, 1100),  # more than four chunks
    "tiles": Size((64, 300), 64, 128, 300),
    "many channels": Size((21, 17), 700, 19, 30),  # more than are packed at a time, and than a float32 sum takes
}


def fitting(size: Size, device: str, backend: str) -> Size:
    """Triton's interpreter takes milliseconds a program: fewer rows and channels, but more than a chunk of both."""
    if (device, backend) != ("cpu", "triton"):
        return size
    return size._replace(rows=tuple(min(n, 270) for n in size.rows), M=min(size.M, 270))


class Grouped(NamedTuple):
    a: Tensor  # [N, M] float32
    r: Tensor  # [T, H] float32
    delta: Tensor  # [E, M, H] float32
    tokens: Tensor  # [N] int64, distinct among one expert's
    offsets: Tensor  # [E + 1] int64
    mask: Tensor  # [N] bool


def grouped(size: Size, behind: int = 2, seed: int = 0) -> Grouped:
    """Random rows; `behind` more lie behind the last expert's, with what may not be followed."""
    g = torch.Generator().manual_seed(seed)
    N = sum(size.rows)
    tokens = [torch.randperm(size.T, generator=g)[:n] for n in size.rows]
    a = torch.randn(N + behind, size.M, generator=g)
    a[N:] = torch.nan
    return Grouped(
        a,
        torch.randn(size.T, size.H, generator=g),
        torch.randn(len(size.rows), size.M, size.H, generator=g),
        torch.cat([*tokens, torch.full((behind,), 2**60)]).long(),
        torch.tensor([0, *size.rows]).cumsum(0),
        torch.rand(N + behind, generator=g) > 0.3,
    )


def moved(args: Grouped, device: str) -> Grouped:
    return Grouped(*(t.to(device) for t in args))


def gram(args: Grouped, device: str = "cpu", masked: bool = True, **options: Any) -> kernels.GramSums:
    """expert_gram, added to what is there."""
    on = moved(args, device)
    sums = kernels.GramSums(*(s.to(device) for s in started(args)))
    kernels.expert_gram(on.a, on.r, on.offsets, on.mask if masked else None, sums, tokens=on.tokens, **options)
    return kernels.GramSums(*(s.cpu() for s in sums))


def halves(args: Grouped, device: str = "cpu", **options: Any) -> tuple[Tensor, Tensor]:
    """A'A and A'R of two calls, each of which leaves the other out; added to what is there."""
    on, found = moved(args, device), list[Tensor]()
    for name in kernels.GramSums._fields:
        (gram, product), r = started(args), on.r if name == "product" else None
        halved = (gram[:, :0, :0], product) if name == "product" else (gram, product[..., :0])
        sums = kernels.GramSums(*(s.contiguous().to(device) for s in halved))
        kernels.expert_gram(on.a, r, on.offsets, on.mask, sums, tokens=on.tokens, **options)
        found.append(getattr(sums, name).cpu())
    return found[0], found[1]


def started(args: Grouped) -> kernels.GramSums:
    """Sums of an earlier call, symmetric as these are."""
    (E, M, H), g = args.delta.shape, torch.Generator().manual_seed(9)
    half = torch.randn(E, M, M, generator=g, dtype=torch.float64)
    return kernels.GramSums(half + half.mT, torch.randn(E, M, H, generator=g, dtype=torch.float64))


def assert_gram_agrees(got: kernels.GramSums, want: kernels.GramSums, args: Grouped, masked: bool = True) -> None:
    """A chunk's sum of n products, one fused multiply-add each, is wrong by at most n u times their magnitudes."""
    size = kernels.gram_sums(*args.delta.shape)
    kept = args._replace(a=args.a.abs(), r=args.r.abs())
    kernels.expert_gram(
        kept.a, kept.r, kept.offsets, kept.mask if masked else None, size, tokens=kept.tokens, backend="reference"
    )
    for name, bound in size._asdict().items():
        assert_within(getattr(got, name), getattr(want, name), 257 * U * bound + 1e-12, name)
    assert torch.equal(got.gram, got.gram.mT)


def scattered(args: Grouped, device: str = "cpu", **options: Any) -> Tensor:
    on = moved(args, device)
    r = on.r.clone()
    kernels.scatter_residual(r, on.a, on.delta, on.tokens, on.offsets, **options)
    return r.cpu()


def assert_scattered_agrees(got: Tensor, want: Tensor, args: Grouped) -> None:
    """Sums of 256 products, as above, and one rounding for each of these and each expert of a token."""
    bounds, sums = args.offsets.tolist(), args.r.double().abs()
    often = torch.zeros(len(args.r), 1, dtype=torch.float64)
    for e, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        token = args.tokens[start:stop]
        sums[token] += args.a[start:stop].double().abs() @ args.delta[e].double().abs()
        often[token] += args.a.shape[1] // 256 + 2
    assert_within(got.double(), want.double(), (257 + often) * U * sums, "r")


def energies(rows: Tensor, args: Grouped, device: str = "cpu", **options: Any) -> tuple[Tensor, Tensor]:
    """gated_energy with gates of its own: A, and the energy added to ones."""
    gates = torch.rand(len(rows), generator=torch.Generator().manual_seed(3)).to(rows.dtype)
    energy = torch.ones(len(args.offsets) - 1, args.a.shape[1], dtype=torch.float64, device=device)
    given = (rows.to(device), gates.to(device), args.offsets.to(device), args.mask.to(device))
    a = kernels.gated_energy(*given, energy, **options)
    return a.cpu(), energy.cpu()


def inner_rows(args: Grouped, dtype: torch.dtype) -> Tensor:
    """What goes into down projections, of very different sizes: [N, M]."""
    g = torch.Generator().manual_seed(4)
    rows = (torch.randn(args.a.shape, generator=g) * torch.rand(len(args.a), 1, generator=g) * 12).to(dtype)
    rows[int(args.offsets[-1]) :] = torch.nan
    return rows


def assert_energies_agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], args: Grouped) -> None:
    """A is rounded once; a square twice, and 256 of them are added in float32."""
    assert torch.equal(got[0], want[0])
    bounds, limit = args.offsets.tolist(), torch.zeros_like(want[1])
    for e, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        limit[e] = 260 * U * want[0][start:stop][args.mask[start:stop]].double().square().sum(0)
    assert_within(got[1], want[1], limit + 1e-14, "energy")
