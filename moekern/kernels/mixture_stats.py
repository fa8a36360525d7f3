"""How far each expert is from the mixture of its token's experts, and the Gram matrix of what they add to it."""

from __future__ import annotations

from torch import Tensor

from moekern.kernels.checks import BOOL, F64, FLOATS, I64, INTS, check_tensors
from moekern.kernels.combine_and_measure import check_rows
from moekern.kernels.dispatch import backend_for, implementation
from moekern.kernels.sums import MixtureSums, as_arguments


def mixture_stats(
    y: Tensor,
    topk_weight: Tensor,
    topk_idx: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    sums: MixtureSums | None,
    gram: Tensor | None = None,
    *,
    share: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Add a batch's rows to MixtureSums and to gram [E, E] float64, in place; None of either is not measured.

    y, topk_weight, topk_idx, order, offsets and mask are as for combine_and_measure, which says what is checked. With
    p = gate·y, a row's distance is that of p from w Σ p, over the rows of its token: gate·‖y - mixture‖ where w = gate
    / Σ gate. share [T, K] (float32, bfloat16 or float16) replaces the gates in w, where these hold more than the
    router's weights (a gain of each expert). gram takes <pᵢ, pⱼ> over the tokens: 1'G1 is what they add up to.
    No gradient passes.

    A token's rows are read once. Products and distances are float32, and so are sums over a row; 1 - w and sums over
    rows are float64, always in the same order. 1 - w counts as 1e-6 at least.
    Raises ValueError for a wrong argument (on a CPU also for wrong values in order and offsets), NotImplementedError
    for a backend that has no such op.
    """
    op = "mixture_stats"
    share = topk_weight if share is None else share
    check_tensors(op, {
        "y": (y, "N H", FLOATS),
        **({} if sums is None else as_arguments(MixtureSums, sums)),
        "gram": (gram, "E E", F64),
        "offsets": (offsets, "E+1", I64),
        "order": (order, "N", I64),
        "topk_idx": (topk_idx, "T K", INTS),
        "topk_weight": (topk_weight, "T K", FLOATS),
        "share": (share, "T K", FLOATS),
        "mask": (mask, "T", BOOL),
    })  # fmt: skip
    name = backend_for(op, y.device.type, backend)
    if name != "native" and y.device.type == "cpu":
        check_rows(op, topk_idx, order, offsets)
    run = implementation(name, op)
    run(y.detach(), topk_weight.detach(), share.detach(), topk_idx, order, offsets, mask, sums, gram)
