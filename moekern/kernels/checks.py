"""Checks shared by all ops: what a caller can get wrong is a ValueError "[op] argument: expected ..., got ..."."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = "dict[str, tuple[Tensor | None, str, tuple[torch.dtype, ...]]]"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32)
I64, F64, BOOL = (torch.int64,), (torch.float64,), (torch.bool,)


def check_tensors(op: str, tensors: Tensors) -> dict[str, int]:
    """Check dtype, device, contiguity and named sizes of name -> (tensor, "T K", dtypes); None is skipped.

    "E+1" is one more than E, a number is itself; "H?" is H, or 0 in all tensors that use it. The first tensor that uses
    a name binds it; returns the sizes.
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
        if word.endswith("?"):
            word = word[:-1] if sizes.setdefault(word, got) else "0"
        size, _, extra = word.partition("+")
        more = int(extra or 0)
        want = (int(size) if size.isdigit() else sizes.setdefault(size, got - more)) + more
        if got != want or got < more:
            raise ValueError(f"[{op}] {name}: expected {word if size.isdigit() else f'{word}={want}'}, got {got}")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
