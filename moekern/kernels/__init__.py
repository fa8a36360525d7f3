"""The ops: check the arguments, choose a backend. Plain tensors in, sums added to in place."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from moekern import _C
from moekern.kernels import native, reference
from moekern.kernels.checks import FLOATS, INTS, check_rows, check_tensors
from moekern.kernels.similarity import SimilaritySums as SimilaritySums
from moekern.kernels.similarity import distance_sum as distance_sum
from moekern.kernels.similarity import similarity as similarity
from moekern.kernels.similarity import similarity_sums as similarity_sums
from moekern.kernels.similarity import sketch as sketch
from moekern.kernels.vocabulary import pair_popcount as pair_popcount
from moekern.kernels.vocabulary import popcount as popcount
from moekern.kernels.vocabulary import vocabulary as vocabulary
from moekern.kernels.vocabulary import vocabulary_bits as vocabulary_bits

I64, F64, BOOL = (torch.int64,), (torch.float64,), (torch.bool,)

OPS = ("router_stats", "combine_and_measure", "similarity", "sketch", "vocabulary", "popcount", "pair_popcount")
SCORES = tuple(reference.SCORES)
BACKENDS: dict[str, ModuleType] = {"native": native, "reference": reference}
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("native", "reference")}
# What a backend cannot do yet on a device. This table only shrinks.
MISSING = {("native", "cuda"): frozenset(OPS)}


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


class ExpertSums(NamedTuple):
    """Sums over the counted rows of one MoE layer. norm is a row's ‖y‖₂ before the gate, a = gate·norm."""

    norm_sum: Tensor  # [E] float64     Σ norm
    norm_square_sum: Tensor  # [E] float64     Σ norm²
    gated_norm_sum: Tensor  # [E] float64     Σ a
    gated_norm_square_sum: Tensor  # [E] float64     Σ a²
    max_abs: Tensor  # [E] float64     largest |y|: merges by maximum
    pair_sum: Tensor  # [E, E] float64  Σ over tokens of aᵢaⱼ; Σ a² on the diagonal
    square_sum: Tensor  # [E, H] float64  Σ y² of each dimension; [E, 0] is not measured


def router_sums(E: int, device: torch.device | str = "cpu") -> RouterSums:
    """Zeros for E experts."""
    shapes = ((1,), (1,), (E,), (E,), (E,), (E,), (E,), (1,), (1,), (E, E))
    whole = {"tokens", "logit_tokens", "count", "top1_count", "coactivation"}
    return RouterSums(
        *(
            torch.zeros(shape, dtype=torch.int64 if name in whole else torch.float64, device=device)
            for name, shape in zip(RouterSums._fields, shapes, strict=True)
        )
    )


def expert_sums(E: int, H: int = 0, device: torch.device | str = "cpu") -> ExpertSums:
    """Zeros for E experts; H = 0 leaves square_sum unmeasured."""
    shapes = ((E,), (E,), (E,), (E,), (E,), (E, E), (E, H))
    return ExpertSums(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))


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
    all positive. Without logits only the sums of slots are added to.

    Scores are summed in float32 over 256 tokens and in float64 across, gates in float64, always in the same order.
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
        )
    }
    check_tensors(op, {
        **integers, **reals,
        "topk_idx": (topk_idx, "T K", INTS),
        "topk_weight": (topk_weight, "T K", FLOATS),
        "logits": (logits, "T E", FLOATS),
        "mask": (mask, "T", BOOL),
    })  # fmt: skip
    run = BACKENDS[backend_for(op, topk_idx.device.type, backend)].router_stats
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
    backend: str | None = None,
) -> Tensor:
    """Σₖ gate·y for each token, [T, H]; the rows' norms, pairs and squares are added to the sums in place.

    y [N, H] (float32, bfloat16 or float16) holds expert outputs grouped by expert: rows offsets[e]:offsets[e+1] are
    expert e's. order [N] int64 names the flat slot t·K + k of each row, offsets is [E+1] int64; topk_weight and
    topk_idx are [T, K] as for router_stats. Every filled slot has one row, empty slots have none, so N <= T·K.
    All tokens are combined; mask [T] bool keeps those that the sums count. No gradient passes.

    The output is rounded to float32 after each product and each sum, in slot order, then once to y's dtype: its bits
    are the same in every backend. A row's squares are summed in float32 (a norm above 1e19 is infinite), rows in
    float64; square_sum in float32 over 256 rows and in float64 across; always in the same order.
    Raises ValueError for a wrong argument (on a CPU also for wrong values in order and offsets), NotImplementedError
    for a backend that has no such op.
    """
    op = "combine_and_measure"
    E = {name: (getattr(sums, name), "E", F64) for name in sums._fields[:5]}
    sizes = check_tensors(op, {
        **E,
        "pair_sum": (sums.pair_sum, "E E", F64),
        "offsets": (offsets, "E+1", I64),
        "y": (y, "N H", FLOATS),
        "order": (order, "N", I64),
        "topk_idx": (topk_idx, "T K", INTS),
        "topk_weight": (topk_weight, "T K", FLOATS),
        "mask": (mask, "T", BOOL),
        "square_sum": (sums.square_sum, "E H" if sums.square_sum.shape[-1:] != (0,) else "E 0", F64),
    })  # fmt: skip
    name = backend_for(op, y.device.type, backend)
    if name != "native" and y.device.type == "cpu":
        check_rows(op, topk_idx, order, offsets, sizes["E"])
    return BACKENDS[name].combine_and_measure(y.detach(), topk_weight.detach(), topk_idx, order, offsets, mask, sums)


def backend_for(op: str, device: str, backend: str | None = None) -> str:
    """The named backend, or the device's first that has the op. A named backend never falls back."""
    for name in [backend] if backend else PREFERENCE.get(device, ()):
        if serves(name, op, device):
            return name
    have = [name for name in BACKENDS if serves(name, op, device)]
    raise NotImplementedError(f"[{op}] backend: expected one of {have} on {device}, got {backend}")


def available() -> dict[str, dict[str, tuple[str, ...]]]:
    """Op -> device -> the backends that serve it here, the default first."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {op: {device: tuple(b for b in PREFERENCE[device] if serves(b, op, device)) for device in devices}
            for op in OPS}  # fmt: skip


def serves(backend: str, op: str, device: str) -> bool:
    if device not in PREFERENCE or op in MISSING.get((backend, device), ()) or not hasattr(BACKENDS.get(backend), op):
        return False
    return backend != "native" or device != "cuda" or _C.cuda_device_count() > 0
