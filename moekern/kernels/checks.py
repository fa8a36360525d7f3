"""Checks shared by all ops: what a caller can get wrong is a ValueError "[op] argument: expected ..., got ..."."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moekern.kernels import ExpertSums

Tensors: TypeAlias = "dict[str, tuple[Tensor | None, str, tuple[torch.dtype, ...]]]"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32)
I64, F64, BOOL = (torch.int64,), (torch.float64,), (torch.bool,)


def check_tensors(op: str, tensors: Tensors) -> dict[str, int]:
    """Check dtype, device, contiguity and named sizes of name -> (tensor, "T K", dtypes); None is skipped.

    "E+1" is one more than E, a number is itself. The first tensor that uses a name binds it; returns the sizes.
    """
    sizes: dict[str, int] = {}
    device: torch.device | None = None
    for name, (tensor, dims, dtypes) in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"[{op}] {name}: expected a tensor, got {type(tensor).__name__}")
        device = device or tensor.device
        if tensor.dtype not in dtypes:
            raise ValueError(f"[{op}] {name}: expected {' or '.join(map(short, dtypes))}, got {short(tensor.dtype)}")
        if tensor.device != device:
            raise ValueError(f"[{op}] {name}: expected a tensor on {device}, got {tensor.device}")
        check_shape(op, name, tensor, dims, sizes)
        if not tensor.is_contiguous():
            raise ValueError(f"[{op}] {name}: expected a contiguous tensor, got strides {list(tensor.stride())}")
    return sizes


def check_shape(op: str, name: str, tensor: Tensor, dims: str, sizes: dict[str, int]) -> None:
    words = dims.split()
    if tensor.ndim != len(words):
        raise ValueError(f"[{op}] {name}: expected shape [{', '.join(words)}], got {list(tensor.shape)}")
    for word, got in zip(words, tensor.shape, strict=True):
        size, _, extra = word.partition("+")
        more = int(extra or 0)
        want = (int(size) if size.isdigit() else sizes.setdefault(size, got - more)) + more
        if got != want or got < more:
            raise ValueError(f"[{op}] {name}: expected {word if size.isdigit() else f'{word}={want}'}, got {got}")


def expert_tensors(sums: ExpertSums) -> Tensors:
    """What check_tensors is to check of the sums over E experts and H dimensions."""
    narrow = {name: (getattr(sums, name), "E", F64) for name in (*sums._fields[:5], "residual_sum")}
    dims = "E 0" if sums.square_sum.shape[-1:] == (0,) else "E H"
    return {
        **narrow,
        "pair_sum": (sums.pair_sum, "E E", F64),
        **{name: (getattr(sums, name), dims, F64) for name in ("square_sum", "value_sum", "unit_sum")},
        "residual_tokens": (sums.residual_tokens, "1", I64),
    }


def check_rows(op: str, topk_idx: Tensor, order: Tensor, offsets: Tensor) -> None:
    """Every filled slot must have exactly one row, and the rows must be grouped by expert.

    Reads values, so a call on a GPU would wait for the device: CPU tensors only.
    """
    E, idx = len(offsets) - 1, topk_idx.reshape(-1).long()
    if offsets[0] != 0 or offsets[-1] > len(order) or (offsets.diff() < 0).any():
        raise ValueError(f"[{op}] offsets: expected offsets rising from 0 to at most {len(order)}")
    N = int(offsets[-1])
    order, expert = order[:N], torch.repeat_interleave(torch.arange(E), offsets.diff())
    inside = (order >= 0) & (order < len(idx))
    wrong = ~inside
    if len(idx):
        slot = order.where(inside, 0)
        first = torch.full_like(idx, N).scatter_reduce(0, slot, torch.arange(N), "amin")
        wrong |= (idx[slot] != expert) | (first[slot] != torch.arange(N))
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ValueError(
            f"[{op}] order: expected each slot of expert {int(expert[n])} once, got slot {int(order[n])} in row {n}"
        )
    filled = int(((idx >= 0) & (idx < E)).sum())
    if filled != N:
        raise ValueError(f"[{op}] offsets: expected a row for each of {filled} slots, got {N}")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
