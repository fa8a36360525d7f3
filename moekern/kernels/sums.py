"""What ops add to. A field's annotation declares how it lies in memory; zeros and checks follow from that.

Everything takes sums by name: backends, the extension and callers may be given any object with these fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from moekern.kernels.checks import Tensors

Sums = TypeVar("Sums")
_DECLARED: dict[type[Any], dict[str, Sum]] = {}


@dataclass(frozen=True)
class Sum:
    """How a sum lies in memory.

    `shape` names its sizes, one word a dimension: "E H". A number is itself. "H?" is H, or 0 in every field of the
    tuple that uses the word where these were not asked for.
    """

    shape: str
    dtype: torch.dtype = torch.float64


def integers(shape: str) -> Sum:
    return Sum(shape, torch.int64)


class RouterSums(NamedTuple):
    """Sums over the counted tokens of one MoE layer. p is a token's score divided by its sum over the experts."""

    tokens: Annotated[Tensor, integers("1")]  # counted tokens
    logit_tokens: Annotated[Tensor, integers("1")]  # of these, tokens whose logits were given
    count: Annotated[Tensor, integers("E")]  # type: ignore[assignment]  # slots routed to e
    top1_count: Annotated[Tensor, integers("E")]  # tokens whose largest gate is e's
    gate_sum: Annotated[Tensor, Sum("E")]  # Σ gate
    gate_square_sum: Annotated[Tensor, Sum("E")]  # Σ gate²
    score_sum: Annotated[Tensor, Sum("E")]  # Σ score, of all experts and not only the chosen
    entropy_sum: Annotated[Tensor, Sum("1")]  # Σ -Σₑ p ln p, in nats
    margin_sum: Annotated[Tensor, Sum("1")]  # Σ k-th largest score - (k+1)-th, 0 where K = E
    coactivation: Annotated[Tensor, integers("E E")]  # tokens that chose both; count on the diagonal
    logit_gram: Annotated[Tensor, Sum("E? E?")]  # Σ lᵢlⱼ of the logits as given


class ExpertSums(NamedTuple):
    """Sums over the counted rows of one MoE layer. norm is a row's ‖y‖₂ before the gate, a = gate·norm."""

    norm_sum: Annotated[Tensor, Sum("E")]  # Σ norm
    norm_square_sum: Annotated[Tensor, Sum("E")]  # Σ norm²
    gated_norm_sum: Annotated[Tensor, Sum("E")]  # Σ a
    gated_norm_square_sum: Annotated[Tensor, Sum("E")]  # Σ a²
    max_abs: Annotated[Tensor, Sum("E")]  # largest |y|: merges by maximum
    pair_sum: Annotated[Tensor, Sum("E E")]  # Σ over tokens of aᵢaⱼ; Σ a² on the diagonal
    square_sum: Annotated[Tensor, Sum("E H?")]  # Σ y² of each dimension
    value_sum: Annotated[Tensor, Sum("E H?")]  # Σ y
    unit_sum: Annotated[Tensor, Sum("E H?")]  # Σ y/norm, without rows of norm 0
    residual_sum: Annotated[Tensor, Sum("E")]  # Σ a·max(0, 1 - cos(h, h + out)), h the residual stream
    residual_tokens: Annotated[Tensor, integers("1")]  # counted tokens whose residual was given


class MixtureSums(NamedTuple):
    """Sums over the counted rows of one MoE layer. p = gate·y is what a row adds to its token's mixture Σ p, w its
    share, and d = ‖p - w Σ p‖₂: how far the expert is from the mixture that it is part of (RAZOR, arXiv:2609.30465)."""

    mixture_norm_sum: Annotated[Tensor, Sum("E?")]  # Σ d
    mixture_square_sum: Annotated[Tensor, Sum("E?")]  # Σ d²
    left_out_norm_sum: Annotated[Tensor, Sum("E?")]  # Σ l, l = d / (1 - w)
    left_out_square_sum: Annotated[Tensor, Sum("E?")]  # Σ l²
    share_sum: Annotated[Tensor, Sum("1?")]  # Σ over tokens of the sum of their shares as they were given
    share_square_sum: Annotated[Tensor, Sum("1?")]  # Σ of its square


def router_sums(E: int, device: torch.device | str = "cpu", *, gram: bool = False) -> RouterSums:
    """Zeros for E experts; without `gram` logit_gram is left unmeasured."""
    return zeros(RouterSums, {"E": E, "E?": E if gram else 0}, device)


def expert_sums(E: int, H: int = 0, device: torch.device | str = "cpu") -> ExpertSums:
    """Zeros for E experts; H = 0 leaves the sums of each dimension unmeasured."""
    return zeros(ExpertSums, {"E": E, "H?": H}, device)


def mixture_sums(E: int, device: torch.device | str = "cpu") -> MixtureSums:
    """Zeros for E experts."""
    return zeros(MixtureSums, {"E?": E, "1?": 1}, device)


def declared(kind: type[Any]) -> Mapping[str, Sum]:
    """Field -> how it lies in memory, in the order of the named tuple `kind`."""
    if kind not in _DECLARED:
        hints = get_type_hints(kind, include_extras=True)
        _DECLARED[kind] = {name: hints[name].__metadata__[0] for name in kind._fields}
    return _DECLARED[kind]


def zeros(kind: type[Sums], sizes: Mapping[str, int], device: torch.device | str = "cpu") -> Sums:
    """Nothing added up yet; `sizes` says what the words of the shapes are, "H?" for itself."""

    def zero(sum: Sum) -> Tensor:
        shape = [int(word) if word.isdigit() else sizes[word] for word in sum.shape.split()]
        return torch.zeros(shape, dtype=sum.dtype, device=device)

    return kind(**{name: zero(sum) for name, sum in declared(kind).items()})


def as_arguments(kind: type[Any], sums: Any) -> Tensors:
    """What check_tensors is to check of an op's sums, whatever the order of their fields."""
    return {name: (getattr(sums, name), sum.shape, (sum.dtype,)) for name, sum in declared(kind).items()}
