"""Checks shared by all ops: what a caller can get wrong is a ValueError "[op] argument: expected ..., got ..."."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeAlias

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
        device = tensor.device if device is None else device
        if tensor.dtype not in dtypes:
            raise ValueError(f"[{op}] {name}: expected {' or '.join(map(short, dtypes))}, got {short(tensor.dtype)}")
        if tensor.device != device:
            raise ValueError(f"[{op}] {name}: expected a tensor on {device}, got {tensor.device}")
        check_shape(op, name, tensor, dims, sizes)
        if not tensor.is_contiguous():
            raise ValueError(f"[{op}] {name}: expected a contiguous tensor, got strides {list(tensor.stride())}")
    return sizes


class Word(NamedTuple):
    """One size of a shape, as `check_tensors` is told it."""

    text: str
    number: int | None  # that it must be, whatever the others are
    size: str  # its name
    more: int  # than the size
    optional: bool


def check_shape(op: str, name: str, tensor: Tensor, dims: str, sizes: dict[str, int]) -> None:
    words, shape = _words(dims), tensor.shape
    if len(shape) != len(words):
        raise ValueError(f"[{op}] {name}: expected shape [{', '.join(dims.split())}], got {list(shape)}")
    for (text, number, size, more, optional), got in zip(words, shape, strict=True):
        if optional and not sizes.setdefault(text, got):
            text, number = "0", 0
        want = number
        if want is None:
            bound = sizes.get(size)
            want = (sizes.setdefault(size, max(got - more, 0)) if bound is None else bound) + more
        if got != want:
            said = want if number is not None else f"{text.rstrip('?')}={want}"
            raise ValueError(f"[{op}] {name}: expected {said}, got {got}")


@cache
def _words(dims: str) -> tuple[Word, ...]:
    """The sizes that a shape names."""
    words = []
    for text in dims.split():
        size, _, more = text.rstrip("?").partition("+")
        number = int(size) + int(more or 0) if size.isdigit() else None
        words.append(Word(text, number, size, int(more or 0), text.endswith("?")))
    return tuple(words)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_grouped(op: str, offsets: Tensor, N: int, tokens: Tensor | None = None, T: int = 0) -> None:
    """Offsets must rise from 0 to at most N, and the tokens of grouped rows lie in [0, T).

    Reads values, so a call on a GPU would wait for the device: CPU tensors only.
    """
    if offsets[0] != 0 or offsets[-1] > N or (offsets.diff() < 0).any():
        raise ValueError(f"[{op}] offsets: expected offsets rising from 0 to at most {N}")
    if tokens is None:
        return
    tokens = tokens[: int(offsets[-1])]
    wrong = (tokens < 0) | (tokens >= T)
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ValueError(f"[{op}] tokens: expected tokens from 0 to {T - 1}, got {int(tokens[n])} in row {n}")


def check_distinct(op: str, offsets: Tensor, tokens: Tensor, T: int) -> None:
    """No token may be twice among one expert's. Values that check_grouped has passed, of CPU tensors."""
    for e, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        own = torch.arange(start, stop)
        first = torch.full((T,), stop).scatter_reduce_(0, tokens[start:stop], own, "amin")
        again = own[first[tokens[start:stop]] != own]
        if len(again):
            n = int(again[0])
            raise ValueError(
                f"[{op}] tokens: expected each token of expert {e} once, got token {int(tokens[n])} again in row {n}"
            )
