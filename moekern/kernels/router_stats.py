"""Statistics of the router's decisions."""

from __future__ import annotations

from torch import Tensor

from moekern.kernels import reference
from moekern.kernels.checks import BOOL, FLOATS, INTS, check_tensors
from moekern.kernels.dispatch import backend_for, implementation
from moekern.kernels.sums import RouterSums, as_arguments

SCORES = tuple(reference.SCORES)


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
    op = "router_stats"
    if score not in SCORES:
        raise ValueError(f"[{op}] score: expected one of {', '.join(SCORES)}, got {score}")
    check_tensors(op, {
        **as_arguments(RouterSums, sums),
        "topk_idx": (topk_idx, "T K", INTS),
        "topk_weight": (topk_weight, "T K", FLOATS),
        "logits": (logits, "T E", FLOATS),
        "mask": (mask, "T", BOOL),
    })  # fmt: skip
    run = implementation(backend_for(op, topk_idx.device.type, backend), op)
    run(None if logits is None else logits.detach(), topk_idx, topk_weight.detach(), mask, sums, score=score)
