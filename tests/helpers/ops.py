"""What the tests of an op need: its backends, its call, and what another order of additions may change of its sums."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import pytest
import torch
from torch import Tensor

from moekern import kernels
from tests.helpers.cases import EDGE, Case, Rows, stream

U = 2.0**-24  # half a unit in float32's last place: the error of one operation
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDE = {**EDGE, "many-blocks": Case(700, 7, 6, 1, empty=True), "half-idle": Case(90, 256, 1, 1, favourite=True)}
INTERPRETED = pytest.mark.skipif(not kernels.serves("triton", "router_stats", "cpu"), reason="no Triton interpreter")


def runs(op: str) -> list[Any]:
    """Every backend on every device it serves: a new backend is tested by being there."""
    cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    others = [b for b in kernels.BACKENDS if b != "reference"]
    found = [pytest.param("cpu", b, id=f"cpu-{b}") for b in others if kernels.serves(b, op, "cpu")]
    for backend in others:
        if op not in kernels.MISSING.get((backend, "cuda"), ()):
            found.append(pytest.param("cuda", backend, marks=cuda, id=f"cuda-{backend}"))
    return found


def fitting(case: Case, device: str, backend: str) -> Case:
    """Triton's interpreter takes milliseconds a program, and each expert is some: fewer, but no power of two."""
    if (device, backend) != ("cpu", "triton") or max(case.E, case.H // 10) <= 100:
        return case
    return case._replace(T=min(case.T, 20), E=min(case.E, 11), K=min(case.K, 6))


def to(device: str, args: Any) -> list[Tensor | None]:
    return [None if a is None else a.to(device) for a in args]


def by_hand(topk_idx: Tensor, E: int, mask: Tensor | None) -> tuple[list[int], list[int]]:
    """The order and the offsets of sort_by_expert."""
    K = topk_idx.shape[1]
    ids = topk_idx.reshape(-1).tolist()
    kept = [True] * len(topk_idx) if mask is None else mask.tolist()
    keys = [e if 0 <= e < E and kept[n // K] else E for n, e in enumerate(ids)]
    order = sorted(range(len(keys)), key=lambda n: (keys[n], n))
    keys.sort()
    return order, [bisect_left(keys, e) for e in range(E + 1)]


def routed(
    args: Any, E: int, device: str = "cpu", backend: str | None = None, score: str = "softmax", gram: bool = True
) -> Any:
    sums = kernels.router_sums(E, device, gram=gram)
    kernels.router_stats(*to(device, args), sums, score=score, backend=backend)
    return kernels.RouterSums(*to("cpu", sums))


def combined(args: Any, E: int, H: int, device: str = "cpu", backend: str | None = None) -> Any:
    sums = kernels.expert_sums(E, H, device)
    residual = stream(Rows(*args)).to(device)
    out = kernels.combine_and_measure(*to(device, args), sums, residual=residual, backend=backend)
    return out.cpu(), kernels.ExpertSums(*to("cpu", sums))


def assert_within(got: Tensor, want: Tensor, atol: Tensor, name: str) -> None:
    near = ((got - want).abs() <= atol) | (got == want) | (got.isnan() & want.isnan())
    assert near.all(), f"{name}: off by up to {float((got - want).abs().max())}"


def assert_router_sums_agree(got: Any, want: Any, args: Any, score: str) -> None:
    for name in ("tokens", "logit_tokens", "count", "top1_count", "coactivation"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.gate_sum, want.gate_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.gate_square_sum, want.gate_square_sum, rtol=1e-12, atol=0)
    T, E = args.logits.shape
    # exp and log are good to 4 ulp, x - max to |x - max| u; a row is summed in 32 lanes, a column over 256 tokens.
    row = (E / 32 + 64) * U
    largest = 1.0 if score in ("softmax", "sigmoid") else float(args.logits.abs().max()) if T else 0.0
    torch.testing.assert_close(got.score_sum, want.score_sum, rtol=row + 256 * U, atol=1e-30)
    torch.testing.assert_close(got.entropy_sum, want.entropy_sum, rtol=0, atol=T * row * (1 + math.log(E)))
    torch.testing.assert_close(got.margin_sum, want.margin_sum, rtol=0, atol=T * 2 * row * largest)
    norm = want.logit_gram.diagonal().sqrt()  # the magnitudes of a pair's products add up to at most norm_i norm_j
    assert_within(got.logit_gram, want.logit_gram, 257 * U * norm[:, None] * norm, "logit_gram")


def assert_expert_sums_agree(got: Any, want: Any, args: Rows, out: Tensor, row: float = 0.0) -> None:
    """`out` is the layer's output on all rows, as the reference gives it; `row` what a sum of squares is wrong by."""
    assert torch.equal(got.max_abs, want.max_abs)
    assert torch.equal(got.residual_tokens, want.residual_tokens)
    # A row's squares are summed in two sets of 16 lanes that take turns every 128 columns, dimensions over 256 rows;
    # both round each square once. A lane has at most 8 columns more than H / 32, and 5 sums join the lanes.
    row = row or (args.y.shape[1] / 32 + 14) * U
    for name in ("norm_sum", "norm_square_sum", "gated_norm_sum", "gated_norm_square_sum", "pair_sum"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=row, atol=0, msg=name)
    torch.testing.assert_close(got.square_sum, want.square_sum, rtol=257 * U, atol=0)
    # Of a dimension's values: at most √(n Σ y²) by Cauchy-Schwarz; of units: at most 1 each, which a norm divides.
    n = args.offsets.diff()[:, None].double()
    assert_within(got.value_sum, want.value_sum, 257 * U * (n * want.square_sum).sqrt(), "value_sum")
    assert_within(got.unit_sum, want.unit_sum, (259 * U + row) * n.expand_as(want.unit_sum), "unit_sum")
    turn = 2 * row * want.gated_norm_sum + turn_errors(args, out, row)
    assert_within(got.residual_sum, want.residual_sum, turn, "residual_sum")


def turn_errors(args: Rows, out: Tensor, row: float) -> Tensor:
    """What Σ a·(1 - cos) may be wrong by where the three dots are wrong by `row` of their magnitudes, [E].

    With κ = (|h| + |out|)² / |h + out|²: the determinant is wrong by 4·row·|h|²|out|² and |h + out|² by row·κ of it,
    so 1 - cos, at most 1 where the determinant is used and else 1 - <h, h + out> / (|h||h + out|), by 8·row·κ.
    """
    h, out = stream(args).double(), out.double()
    kappa = ((h.norm(dim=1) + out.norm(dim=1)) / (h + out).norm(dim=1)).square().nan_to_num(0)
    slot = args.order[: args.offsets[-1]]
    a = args.y[: len(slot)].double().norm(dim=1) * args.topk_weight.reshape(-1)[slot].double()
    expert = args.topk_idx.reshape(-1)[slot].long()
    error = a * (8 * row * kappa).clamp(max=2).repeat_interleave(args.topk_idx.shape[1])[slot]
    return torch.zeros(len(args.offsets) - 1, dtype=torch.float64).index_add(0, expert, error)
