"""How alike experts are on the same tokens: inner products and cosines of all pairs of their outputs, added up."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from moekern.kernels.checks import FLOATS, check_tensors
from moekern.kernels.dispatch import backend_for, implementation
from moekern.kernels.sums import Sum, as_arguments, integers, zeros


class SimilaritySums(NamedTuple):
    """Sums over the counted tokens of one layer, y the experts' outputs before the gate. The matrices are symmetric."""

    tokens: Annotated[Tensor, integers("1")]  # counted tokens
    gram_sum: Annotated[Tensor, Sum("E E")]  # Σ <yᵢ, yⱼ>; Σ ‖y‖² on the diagonal
    cosine_sum: Annotated[Tensor, Sum("E E")]  # Σ <yᵢ, yⱼ> / (‖yᵢ‖·‖yⱼ‖), 0 where a row is zero


def similarity_sums(E: int, device: torch.device | str = "cpu") -> SimilaritySums:
    """Zeros for E experts."""
    return zeros(SimilaritySums, {"E": E}, device)


def similarity(
    y: Tensor,
    mask: Tensor | None,
    sums: SimilaritySums,
    *,
    norm_square: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Add a tile of tokens that every expert has run on to a layer's sums, in place.

    y [E, T, H] (float32, bfloat16 or float16) is expert by expert, as their down-projections write it: nothing is
    transposed, since a token's rows are read by stride. mask [T] bool keeps the tokens that count. norm_square [E, T]
    float32 gives exact squared norms where y is a `sketch`: they make the diagonal and divide the cosines.

    A token's products are summed in float32: 256 columns in 8 lanes, then block after block, so that each is wrong by
    at most (H/256 + 36)·2⁻²⁴·Σ|yᵢyⱼ|; on a GPU 64 columns in order, then chain after chain, (H/64 + 64)·2⁻²⁴.
    Tokens are added in float64 in their order: neither threads nor instruction sets nor the division of tokens into
    calls change a bit (natively; the reference keeps this up to float64 rounding).
    Squares are float32: a row of norm above 1e19 is infinite, one below 1e-23 zero.
    Raises ValueError for a wrong argument, NotImplementedError for a backend that has no such op.
    """
    check_tensors("similarity", {
        "y": (y, "E T H", FLOATS),
        "mask": (mask, "T", (torch.bool,)),
        "norm_square": (norm_square, "E T", (torch.float32,)),
        **as_arguments(SimilaritySums, sums),
    })  # fmt: skip
    name = backend_for("similarity", y.device.type, backend)
    implementation(name, "similarity")(y.detach(), norm_square, mask, sums)


def distance_sum(sums: SimilaritySums) -> Tensor:
    """Σ ‖yᵢ - yⱼ‖² over the counted tokens, [E, E] float64.

    From the Gram sums, so absolute errors are about 2⁻¹⁸ of Σ ‖yᵢ‖² + Σ ‖yⱼ‖²: experts closer than that are not told
    apart by it.
    """
    square = sums.gram_sum.diagonal()
    return (square[:, None] + square[None, :] - 2 * sums.gram_sum).clamp(min=0)


def sketch(y: Tensor, size: int, *, seed: int = 0, start: int = 0, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Random projections [E, T, size] of rows y [E, T, H], and the rows' exact squared norms [E, T]; float32.

    For experts that run one after the other: keep the sketches of each (E = 1 a call) and give them, stacked, to
    `similarity` with the norms. `start` is the first row's position among all the tokens; every 64 positions share one
    projection of independent ±1/√size, drawn from (seed, position // 64) alone, so all experts see the same one.
    <zᵢ, zⱼ> is unbiased for <yᵢ, yⱼ>; with ρ the cosine of one token's pair, its standard deviation is at most
    √((1 + ρ²) / size)·‖yᵢ‖·‖yⱼ‖. Errors of different projections are independent, so the mean of n chunks of 64 tokens
    has at most √(2 / (n·size)). Backends draw the same signs and differ by float32 rounding; y's dtype does not matter.
    Raises ValueError for a wrong argument, NotImplementedError for a backend that has no such op.
    """
    check_tensors("sketch", {"y": (y, "E T H", FLOATS)})
    if size < 1:
        raise ValueError(f"[sketch] size: expected 1 or more, got {size}")
    if start < 0:
        raise ValueError(f"[sketch] start: expected 0 or more, got {start}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"[sketch] seed: expected a signed 64-bit integer, got {seed}")
    name = backend_for("sketch", y.device.type, backend)
    return implementation(name, "sketch")(y.detach(), size, seed=seed, start=start)
