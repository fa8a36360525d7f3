"""What the sums of a layer must have in common, whoever measured them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moekern.statistics.layer import LayerStatistics

# Sums over the rows that were routed to an expert: nothing where there are none.
ROUTED = (
    "gate_sum", "gate_square_sum", "coactivation", "norm_sum", "norm_square_sum", "gated_norm_sum",
    "gated_norm_square_sum", "max_abs", "pair_sum",
)  # fmt: skip
SYMMETRIC = ("coactivation", "logit_gram", "pair_sum")
ROUNDING = 1e-6  # of the largest entry; sums of float64 in any order are closer


def contradiction(sums: LayerStatistics, top_k: int) -> str | None:
    """The first field that contradicts another, with the reason; None when they agree. Sizes and signs are right."""
    # Python integers, because a damaged file's counts could overflow an int64 sum.
    tokens, slots, first = int(sums.tokens), sum(sums.count.tolist()), sum(sums.top1_count.tolist())
    if slots > tokens * top_k:
        return f"count: {slots} routed slots exceed {tokens} tokens x top-{top_k}"
    if int(sums.logit_tokens) > tokens:
        return f"logit_tokens: {int(sums.logit_tokens)} exceed {tokens} tokens"
    if first > tokens:
        return f"top1_count: {first} first choices exceed {tokens} tokens"
    where = _first(sums.top1_count > sums.count)
    if where is not None:
        return f"top1_count: expert {where} is the first choice of more tokens than have chosen it"
    where = _first(sums.coactivation.diagonal() != sums.count)
    if where is not None:
        return f"coactivation: its diagonal is not count at expert {where}"
    idle = sums.count == 0
    for name in ROUTED if idle.any() else ():
        where = _first(idle & (getattr(sums, name).reshape(sums.num_experts, -1) != 0).any(1))
        if where is not None:
            return f"{name}: not 0 for expert {where}, which no token has chosen"
    for name in SYMMETRIC:
        pairs: Tensor = getattr(sums, name)
        if pairs.numel() and ((pairs - pairs.T).abs() > ROUNDING * pairs.abs().max()).any():
            return f"{name}: not symmetric"
    return _halves_problem(sums)


def _halves_problem(sums: LayerStatistics) -> str | None:
    """Why what is kept by halves of the text is not the whole's; None where it is, or where it is not kept."""
    for name in sums.halved if sums.half_tokens.numel() else ():
        whole, half = getattr(sums, name), getattr(sums, f"half_{name}")
        if len(half) != 2:
            return f"half_{name}: missing beside half_tokens"
        both = half.amax(0) if name == "max_abs" else half[0] + half[1]
        room = ROUNDING * float(whole.abs().max()) if whole.is_floating_point() else 0
        if ((both - whole).abs() > room).any():
            return f"half_{name}: the two halves do not make {name}"
    return None


def _first(wrong: Tensor) -> int | None:
    """The lowest expert of those that are wrong [E]."""
    return int(torch.nonzero(wrong)[0]) if wrong.any() else None
