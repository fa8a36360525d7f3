"""Shapes and inputs shared by the kernels' tests and benches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moekern.kernels.quantised import Quantised, scaled


class Case(NamedTuple):
    """T tokens, E experts, K slots a token, hidden size H; what is unusual about the routing."""

    T: int
    E: int
    K: int
    H: int
    masked: bool = False
    empty: bool = False  # some ids are -1 or E and above
    favourite: bool = False  # every token's first slot goes to expert 0, the last expert is idle
    ids: torch.dtype = torch.int64


EDGE = {
    "no-token": Case(0, 4, 2, 8),
    "one-token": Case(1, 4, 2, 1, ids=torch.int32),
    "two-experts": Case(40, 2, 1, 31),
    "all-chosen": Case(33, 5, 5, 33, masked=True),
    "one-expert": Case(270, 1, 1, 7),
    "favourite": Case(600, 6, 3, 64, favourite=True),
    "masked": Case(513, 160, 6, 97, masked=True, ids=torch.int32),
    "empty-slots": Case(300, 384, 8, 300, empty=True),
    "all": Case(530, 513, 22, 45, masked=True, empty=True, favourite=True),
    "wide": Case(37, 8, 2, 2100, masked=True),
}


class Router(NamedTuple):
    """Arguments of router_stats before the sums."""

    logits: Tensor
    topk_idx: Tensor
    topk_weight: Tensor
    mask: Tensor | None


class Rows(NamedTuple):
    """Arguments of combine_and_measure before the sums."""

    y: Tensor
    topk_weight: Tensor
    topk_idx: Tensor
    order: Tensor
    offsets: Tensor
    mask: Tensor | None


class Mlp(NamedTuple):
    """Arguments of grouped_mlp before the sums."""

    x: Tensor
    gate_up: Tensor | Quantised
    down: Tensor | Quantised
    topk_weight: Tensor
    topk_idx: Tensor
    order: Tensor
    offsets: Tensor
    mask: Tensor | None


def router(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Router:
    T, E, K, _, masked, empty, favourite, ids = case
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=g) * 3
    if favourite:
        logits[:, 0] = 20
        logits[:, -1] = -20
    weight, idx = logits.softmax(1).topk(K, dim=1)
    if empty:
        gap = torch.rand(T, K, generator=g)
        idx = idx.masked_fill(gap < 0.1, -1).masked_fill(gap > 0.9, E + 2)
    mask = torch.rand(T, generator=g) < 0.7 if masked else None
    return Router(logits.to(dtype), idx.to(ids), (weight / weight.sum(1, keepdim=True)).to(dtype), mask)


def rows(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Rows:
    _, idx, weight, mask = router(case, dtype, seed)
    order, offsets = grouped(idx, case.E)
    y = torch.randn(len(order), case.H, generator=torch.Generator().manual_seed(seed + 1))
    return Rows(y.to(dtype), weight, idx, order, offsets, mask)


def stream(args: Rows) -> Tensor:
    """A residual stream [T, H] that the rows' outputs turn now a little, now a lot; the first token's is zero."""
    T, H = len(args.topk_idx), args.y.shape[1]
    scale = torch.logspace(1, -1, max(T, 1))[:T, None]
    h = torch.randn(T, H, generator=torch.Generator().manual_seed(T)) * scale
    h[:1] = 0
    return h.to(args.y.dtype)


def grouped(topk_idx: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """The filled slots in expert order, tokens rising within an expert, and where each expert starts."""
    flat = topk_idx.reshape(-1).long()
    slots = ((flat >= 0) & (flat < E)).nonzero()[:, 0]
    counts = torch.bincount(flat[slots], minlength=E)
    return slots[flat[slots].argsort(stable=True)], torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def mlp(
    case: Case, width: int, dtype: torch.dtype = torch.float32, fp8: tuple[int, int] | None = None, seed: int = 0,
    scales: torch.dtype = torch.float32,
) -> Mlp:  # fmt: skip
    """Experts of intermediate size `width`, outputs about 1; with `fp8` weights in blocks of that size."""
    _, idx, gate, mask = router(case, dtype, seed)
    order, offsets = grouped(idx, case.E)
    g = torch.Generator().manual_seed(seed + 2)

    def matrix(rows: int, columns: int) -> Tensor | Quantised:
        w = torch.randn(case.E, rows, columns, generator=g) / columns**0.5
        if fp8 is None:
            return w.to(dtype)
        blocks = (-(-side // size) for side, size in zip((rows, columns), fp8, strict=True))
        scale = 2.0 ** torch.randint(-9, -6, (case.E, *blocks), generator=g)
        if scales != torch.float8_e8m0fnu:
            scale *= 1.3
        return scaled((w * 128).to(torch.float8_e4m3fn), scale.to(scales), fp8)

    x = torch.randn(case.T, case.H, generator=g).to(dtype)
    return Mlp(x, matrix(2 * width, case.H), matrix(case.H, width), gate, idx, order, offsets, mask)


def moved(args: Mlp, device: str) -> Mlp:
    def to(value: Tensor | Quantised | None) -> Tensor | Quantised | None:
        if isinstance(value, Quantised):
            return replace(value, codes=value.codes.to(device), scale=value.scale.to(device))
        return value if value is None else value.to(device)

    return Mlp(*map(to, args))


def float8(code: int, exponent_bits: int, mantissa_bits: int, bias: int, ieee: bool) -> float:
    """OCP 8-bit floating point, revision 1.0, from its tables."""
    sign = -1.0 if code >> 7 else 1.0
    exponent, mantissa = code >> mantissa_bits & (1 << exponent_bits) - 1, code & (1 << mantissa_bits) - 1
    top = (1 << exponent_bits) - 1
    if ieee and exponent == top:
        return math.nan if mantissa else sign * math.inf
    if not ieee and exponent == top and mantissa == (1 << mantissa_bits) - 1:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
