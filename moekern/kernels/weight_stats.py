"""Sums over the weights of experts, as they are stored: for criteria that need no text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from moekern.kernels.checks import FLOATS, check_tensors
from moekern.kernels.dequantize import dequantize
from moekern.kernels.dispatch import backend_for, implementation
from moekern.kernels.quantised import Quantised
from moekern.kernels.sums import Sum, as_arguments, declared, integers, zeros


class WeightSums(NamedTuple):
    """Sums over the weights of each expert. RMS = √(square_sum / count), AIMER (2603.18492) = abs_sum / count / RMS."""

    count: Annotated[Tensor, integers("E")]  # type: ignore[assignment]  # weights seen
    abs_sum: Annotated[Tensor, Sum("E")]  # Σ |w|
    square_sum: Annotated[Tensor, Sum("E")]  # Σ w²
    max_abs: Annotated[Tensor, Sum("E")]  # largest |w|: merges by maximum


def weight_sums(E: int, device: torch.device | str = "cpu") -> WeightSums:
    """Zeros for E experts."""
    return zeros(WeightSums, {"E": E}, device)


def of_expert(sums: WeightSums, e: int) -> WeightSums:
    """A view of expert e's sums, for matrices that a checkpoint stores one by one."""
    return WeightSums(**{name: getattr(sums, name)[e : e + 1] for name in declared(WeightSums)})


def weight_stats(weight: Tensor | Quantised, sums: WeightSums, *, backend: str | None = None) -> None:
    """Add a weight to the sums of its experts, in place; calls for an expert's other matrices add up.

    A weight is [E, R, C] for the E experts of the sums, or [R, C] for sums of one (see of_expert): float32, bfloat16 or
    float16, contiguous, or a Quantised, whose values are those that dequantize gives in float32.

    Summed in float32 over at most 2048 weights and in float64 across, in one order for every number of threads and
    instruction set; a |w| above 1e19 makes square_sum infinite. A NaN makes the three sums of its expert NaN, an
    infinity makes them infinite. Raises ValueError for a wrong argument, NotImplementedError for a backend that has no
    such op.
    """
    op = "weight_stats"
    dense = weight.codes if isinstance(weight, Quantised) else _stack(op, weight)
    dtypes = (torch.uint8,) if isinstance(weight, Quantised) else FLOATS
    check_tensors(op, {**as_arguments(WeightSums, sums), "weight": (dense, "E R C", dtypes)})
    run = implementation(backend_for(op, dense.device.type, backend), op)
    run(weight if isinstance(weight, Quantised) else dense.detach().flatten(1), sums)


def stable_rank(weight: Tensor | Quantised, *, tolerance: float = 1e-3, steps: int = 200) -> Tensor:
    """‖W‖²_F / σ₁² of each expert's matrix, [E] float64; W is [R, C] or [E, R, C] as for weight_stats.

    σ₁² is the largest eigenvalue λ of WᵀW, found by the Lanczos method: power iteration that keeps its vectors, so it
    needs 5 to 10 times fewer products with W. WᵀW is never formed, and one expert at a time is held in float32. It
    starts from one fixed pseudo-random vector and stops when ‖WᵀWv - λv‖ <= tolerance · λ for the unit vector v found.
    An eigenvalue then lies within tolerance · λ of λ. That it is the largest is likely, not proved: λ may belong to the
    second where the two are a few tolerances apart. λ is never above the largest but for rounding, so the stable rank
    is too large rather than too small. A zero or empty matrix gives 0, one that is not finite NaN.
    Raises ValueError for a wrong argument, and RuntimeError where `steps` products are not enough.
    """
    op = "stable_rank"
    if not 1e-5 <= tolerance < 1:  # less is lost in float32's rounding
        raise ValueError(f"[{op}] tolerance: expected at least 1e-5 and less than 1, got {tolerance}")
    if not isinstance(weight, Quantised):
        check_tensors(op, {"weight": (_stack(op, weight), "E R C", FLOATS)})
    ranks = [_stable_rank(w, tolerance, steps) for w in _matrices(weight)]
    device = weight.codes.device if isinstance(weight, Quantised) else weight.device
    return torch.tensor(ranks, dtype=torch.float64, device=device)


def _matrices(weight: Tensor | Quantised) -> Iterator[Tensor]:
    if isinstance(weight, Quantised):
        return (dequantize(weight.expert(e), torch.float32)[0] for e in range(len(weight.codes)))
    return (w.detach().float() for w in _stack("stable_rank", weight))


def _stable_rank(w: Tensor, tolerance: float, steps: int) -> float:
    square = float(w.double().square().sum())
    if square == 0:
        return 0.0
    if not square < float("inf"):
        return float("nan")
    w = (w.double() * square**-0.5).float()  # ‖W‖_F = 1: no square below is too large or too small for float32
    n = w.shape[1]
    v = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(w.device)
    v /= v.norm()
    basis = torch.empty(0, n, device=w.device)
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, n)):
        basis = torch.cat([basis, v[None]])
        next_v = w.T @ (w @ v)
        diagonal.append(float(next_v.double() @ v.double()))
        for _ in range(2):  # twice: once leaves rounding that brings found directions back
            next_v -= basis.T @ (basis @ next_v)
        rest = float(next_v.double().norm())
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        if rest * abs(float(vectors[-1, -1])) <= tolerance * float(values[-1]) or len(diagonal) == n:
            return 1 / float(values[-1])
        beside.append(rest)
        v = next_v / rest
    raise RuntimeError(f"[stable_rank] steps: expected at most {steps} products for a tolerance of {tolerance}")


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    d, b = torch.tensor(diagonal, dtype=torch.float64), torch.tensor(beside, dtype=torch.float64)
    return torch.diag(d) + torch.diag(b, 1) + torch.diag(b, -1)


def _stack(op: str, weight: Tensor) -> Tensor:
    if not isinstance(weight, Tensor):
        raise ValueError(f"[{op}] weight: expected a tensor or a Quantised, got {type(weight).__name__}")
    return weight[None] if weight.ndim == 2 else weight
