"""Which token ids reached which expert: one bit each, so that vocabularies unite by OR and are counted by popcount."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.kernels.checks import INTS, check_tensors
from moekern.kernels.dispatch import backend_for, implementation

I64 = (torch.int64,)


def vocabulary_bits(E: int, V: int, device: torch.device | str = "cpu") -> Tensor:
    """No id seen: [E, ceil(V / 64)] int64. Bit v mod 64 of word v // 64 stands for id v."""
    return torch.zeros(E, -(-V // 64), dtype=torch.int64, device=device)


def vocabulary(
    token_ids: Tensor, topk_idx: Tensor, mask: Tensor | None, bits: Tensor, *, backend: str | None = None
) -> None:
    """Set the bit of each token's id for each expert that the token is routed to, in place.

    token_ids [T] and topk_idx [T, K] are int64 or int32; expert ids outside [0, E) are empty slots. mask [T] bool keeps
    the tokens that count; None keeps all. bits [E, W] int64 is `vocabulary_bits` or any number of earlier calls'; bits
    of two runs merge by `|`. Raises ValueError for a wrong argument (on a CPU also for a counted token's id outside
    [0, 64·W), before anything is set; natively on a GPU such an id sets nothing), NotImplementedError for a backend
    that has no such op.
    """
    op = "vocabulary"
    check_tensors(op, {
        "bits": (bits, "E W", I64),
        "token_ids": (token_ids, "T", INTS),
        "topk_idx": (topk_idx, "T K", INTS),
        "mask": (mask, "T", (torch.bool,)),
    })  # fmt: skip
    name = backend_for(op, bits.device.type, backend)
    if name != "native" and bits.device.type == "cpu":
        check_token_ids(op, token_ids, mask, 64 * bits.shape[1])
    implementation(name, "vocabulary")(token_ids, topk_idx, mask, bits)


def popcount(bits: Tensor, *, backend: str | None = None) -> Tensor:
    """How many ids each expert has seen, [E] int64, of bits [E, W]. Errors as `vocabulary`."""
    check_tensors("popcount", {"bits": (bits, "E W", I64)})
    return implementation(backend_for("popcount", bits.device.type, backend), "popcount")(bits)


def pair_popcount(bits: Tensor, *, backend: str | None = None) -> Tensor:
    """How many ids both experts of each pair have seen, [E, E] int64, of bits [E, W]. Errors as `vocabulary`."""
    check_tensors("pair_popcount", {"bits": (bits, "E W", I64)})
    return implementation(backend_for("pair_popcount", bits.device.type, backend), "pair_popcount")(bits)


def check_token_ids(op: str, token_ids: Tensor, mask: Tensor | None, stop: int) -> None:
    wrong = (token_ids < 0) | (token_ids >= stop)
    wrong = wrong if mask is None else wrong & mask
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise ValueError(f"[{op}] token_ids: expected ids from 0 to {stop - 1}, got {int(token_ids[t])} for token {t}")
