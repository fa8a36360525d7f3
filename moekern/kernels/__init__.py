"""The ops: check the arguments, choose a backend. Plain tensors in, sums added to in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moekern.kernels import reference
from moekern.kernels.checks import BOOL, F64, FLOATS, I64, INTS, check_rows, check_tensors, expert_tensors
from moekern.kernels.dispatch import BACKENDS, MISSING, OPS, PREFERENCE, available, backend_for, implementation, serves
from moekern.kernels.mlp import grouped_mlp
from moekern.kernels.quantised import Quantised, dequantize
from moekern.kernels.similarity import SimilaritySums, distance_sum, similarity, similarity_sums, sketch
from moekern.kernels.sorting import sort_by_expert
from moekern.kernels.vocabulary import pair_popcount, popcount, vocabulary, vocabulary_bits
from moekern.kernels.weights import WeightSums, of_expert, stable_rank, weight_stats, weight_sums

__all__ = (
    "BACKENDS", "MISSING", "OPS", "PREFERENCE", "SCORES", "ExpertSums", "Quantised", "RouterSums", "SimilaritySums",
    "WeightSums", "available", "backend_for", "combine_and_measure", "dequantize", "distance_sum", "expert_sums",
    "grouped_mlp", "of_expert", "pair_popcount", "popcount", "router_stats", "router_sums", "serves", "similarity",
    "similarity_sums", "sketch", "sort_by_expert", "stable_rank", "vocabulary", "vocabulary_bits", "weight_stats",
    "weight_sums",
)  # fmt: skip

SCORES = tuple(reference.SCORES)


class RouterSums(NamedTuple):
    """Sums over the counted tokens of one MoE layer. p is a token's score divided by its sum over the experts."""

    tokens: Tensor  # [1] int64     counted tokens
    logit_tokens: Tensor  # [1] int64     of these, tokens whose logits were given
    count: Tensor  # type: ignore[assignment]  # [E] int64     slots routed to e
    top1_count: Tensor  # [E] int64     tokens whose largest gate is e's
    gate_sum: Tensor  # [E] float64   Σ gate
    gate_square_sum: Tensor  # [E] float64   Σ gate²
    score_sum: Tensor  # [E] float64   Σ score, of all experts and not only the chosen
    entropy_sum: Tensor  # [1] float64   Σ -Σₑ p ln p, in nats
    margin_sum: Tensor  # [1] float64   Σ k-th largest score - (k+1)-th, 0 where K = E
    coactivation: Tensor  # [E, E] int64  tokens that chose both; count on the diagonal
    logit_gram: Tensor  # [E, E] float64  Σ lᵢlⱼ of the logits as given; [0, 0] is not measured


class ExpertSums(NamedTuple):
    """Sums over the counted rows of one MoE layer. norm is a row's ‖y‖₂ before the gate, a = gate·norm."""

    norm_sum: Tensor  # [E] float64     Σ norm
    norm_square_sum: Tensor  # [E] float64     Σ norm²
    gated_norm_sum: Tensor  # [E] float64     Σ a
    gated_norm_square_sum: Tensor  # [E] float64     Σ a²
    max_abs: Tensor  # [E] float64     largest |y|: merges by maximum
    pair_sum: Tensor  # [E, E] float64  Σ over tokens of aᵢaⱼ; Σ a² on the diagonal
    square_sum: Tensor  # [E, H] float64  Σ y² of each dimension; these three are [E, 0] where not measured
    value_sum: Tensor  # [E, H] float64  Σ y
    unit_sum: Tensor  # [E, H] float64  Σ y/norm, without rows of norm 0
    residual_sum: Tensor  # [E] float64     Σ a·max(0, 1 - cos(h, h + out)), h the residual stream
    residual_tokens: Tensor  # [1] int64       counted tokens whose residual was given


def router_sums(E: int, device: torch.device | str = "cpu", *, gram: bool = False) -> RouterSums:
    """Zeros for E experts; without `gram` logit_gram is left unmeasured."""
    G = E if gram else 0
    shapes = ((1,), (1,), (E,), (E,), (E,), (E,), (E,), (1,), (1,), (E, E), (G, G))
    whole = {"tokens", "logit_tokens", "count", "top1_count", "coactivation"}
    return RouterSums(*_zeros(RouterSums._fields, shapes, whole, device))


def expert_sums(E: int, H: int = 0, device: torch.device | str = "cpu") -> ExpertSums:
    """Zeros for E experts; H = 0 leaves the sums of each dimension unmeasured."""
    shapes = ((E,), (E,), (E,), (E,), (E,), (E, E), (E, H), (E, H), (E, H), (E,), (1,))
    return ExpertSums(*_zeros(ExpertSums._fields, shapes, {"residual_tokens"}, device))


def _zeros(
    names: Iterable[str], shapes: Iterable[tuple[int, ...]], whole: set[str], device: torch.device | str
) -> Iterator[Tensor]:
    for name, shape in zip(names, shapes, strict=True):
        yield torch.zeros(shape, dtype=torch.int64 if name in whole else torch.float64, device=device)


def router_stats(
    logits: Tensor | None,
    topk_idx: Tensor,
    topk_weight: Tensor,
    mask: Tensor | None,
    sums: RouterSums,
    *,
    score: str = "softmax",
    backend: str | None = None,
) -> None:
    """Add one batch of routing decisions to a layer's sums, in place.

    logits [T, E] and topk_weight [T, K] are float32, bfloat16 or float16, topk_idx [T, K] int64 or int32. Ids outside
    [0, E) are empty slots and not counted; the ids of a token are distinct (of two equal ones each is counted, but
    they make no pair). mask [T] bool keeps the tokens that count; None keeps all. Among equal gates the lowest slot is
    top-1. `score` says what a logit becomes: softmax, sigmoid, sqrtsoftplus, or identity for logits that are scores,
    all positive. Without logits only the sums of slots are added to. logit_gram takes the logits before any score, and
    is infinite or NaN where they are not finite.

    Scores and products of logits are summed in float32 over at most 256 tokens and in float64 across, gates in
    float64, always in the same order.
    Raises ValueError for a wrong argument, NotImplementedError for a backend that has no such op.
    """
    op, E = "router_stats", "E"
    if score not in SCORES:
        raise ValueError(f"[{op}] score: expected one of {', '.join(SCORES)}, got {score}")
    integers = {
        name: (getattr(sums, name), dims, I64)
        for name, dims in (
            ("count", E),
            ("top1_count", E),
            ("tokens", "1"),
            ("logit_tokens", "1"),
            ("coactivation", "E E"),
        )
    }
    reals = {
        name: (getattr(sums, name), dims, F64)
        for name, dims in (
            ("gate_sum", E),
            ("gate_square_sum", E),
            ("score_sum", E),
            ("entropy_sum", "1"),
            ("margin_sum", "1"),
            ("logit_gram", "0 0" if sums.logit_gram.shape == (0, 0) else "E E"),
        )
    }
    check_tensors(op, {
        **integers, **reals,
        "topk_idx": (topk_idx, "T K", INTS),
        "topk_weight": (topk_weight, "T K", FLOATS),
        "logits": (logits, "T E", FLOATS),
        "mask": (mask, "T", BOOL),
    })  # fmt: skip
    run = implementation(backend_for(op, topk_idx.device.type, backend), op)
    run(None if logits is None else logits.detach(), topk_idx, topk_weight.detach(), mask, sums, score=score)


def combine_and_measure(
    y: Tensor,
    topk_weight: Tensor,
    topk_idx: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    sums: ExpertSums,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Σₖ gate·y for each token, [T, H]; the rows' norms, pairs and dimensions are added to the sums in place.

    y [N, H] (float32, bfloat16 or float16) holds expert outputs grouped by expert: rows offsets[e]:offsets[e+1] are
    expert e's. order [N] int64 names the flat slot t·K + k of each row, offsets is [E+1] int64: what sort_by_expert
    returns. topk_weight and topk_idx are [T, K] as for router_stats. Every filled slot has one row, empty slots have
    none; rows and entries of order from offsets[E] on are not read. All tokens are combined; mask [T] bool keeps those
    that the sums count. No gradient passes.

    residual [T, H], of y's dtype, is the stream h that the layer's output is added to: residual_sum is EASY-EP's
    importance of an expert (arXiv 2504.06792), weighing a token by how far `out`, as returned, turns h. The cosine with
    a zero vector is 0. Without it neither residual_sum nor residual_tokens is added to.

    The output is rounded to float32 after each product and each sum, in slot order, then once to y's dtype: its bits
    are the same in every backend. A row's squares are summed in float32 (a norm above 1e19 is infinite, one below
    1e-23 zero), rows in float64; sums of a dimension in float32 over at most 256 rows and in float64 across; <h, h>,
    <h, out> and <out, out> in float32, and 1 - cos in float64 from their determinant, <h, h><out, out> - <h, out>²,
    so that small turns keep their digits; always in the same order.
    Raises ValueError for a wrong argument (on a CPU also for wrong values in order and offsets), NotImplementedError
    for a backend that has no such op.
    """
    op = "combine_and_measure"
    check_tensors(op, {
        "y": (y, "N H", FLOATS),
        **expert_tensors(sums),
        "offsets": (offsets, "E+1", I64),
        "order": (order, "N", I64),
        "topk_idx": (topk_idx, "T K", INTS),
        "topk_weight": (topk_weight, "T K", FLOATS),
        "mask": (mask, "T", BOOL),
        "residual": (residual, "T H", (y.dtype,) if isinstance(y, Tensor) else FLOATS),
    })  # fmt: skip
    name = backend_for(op, y.device.type, backend)
    if name != "native" and y.device.type == "cpu":
        check_rows(op, topk_idx, order, offsets)
    run = implementation(name, op)
    h = None if residual is None else residual.detach()
    out: Tensor = run(y.detach(), topk_weight.detach(), topk_idx, order, offsets, mask, h, sums)
    return out
