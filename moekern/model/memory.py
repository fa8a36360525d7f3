"""Take no memory for weights before they are there, keep them apart, let them go, and give freed memory back."""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt
LARGE = 1 << 20  # bytes
USUAL = 32 << 20  # bytes: to which glibc raises its own threshold
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # shapes of products; the second is torch's own
SHAPE = 4 << 20  # bytes of code and scratch for one shape: up to 5.3 MB with AMX were measured, 1.7 of them resident


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def _of_libc(name: str) -> Callable[..., int] | None:
    return getattr(_libc(), name, None)


_trim, _mallopt = _of_libc("malloc_trim"), _of_libc("mallopt")


def return_freed_memory() -> None:
    """Hand the C library's free pages back, where it is glibc; elsewhere nothing happens.

    A layer's tensors are many and small enough to come from the heap, which glibc keeps when they are freed: without
    this, resident memory grew with every layer (from 1.2 to 2.2 GB over twelve layers of 0.2 GB).
    """
    if _trim is not None:
        _trim(0)


@contextmanager
def weights_apart() -> Iterator[None]:
    """What is allocated in the context gets pages of its own where it is LARGE, with glibc: they go when it is freed.

    In the heap, what is allocated later lies above it, and holes stay. Where a person has set the threshold
    (MALLOC_MMAP_THRESHOLD_), that one holds.
    """
    if _mallopt is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    _mallopt(MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        _mallopt(MMAP_THRESHOLD, USUAL)
        _mallopt(TRIM_THRESHOLD, 2 * USUAL)  # which glibc raises together, and leaves at 128 KiB where one is set


def pages(nbytes: int) -> torch.Tensor:
    """So many bytes, uint8 [nbytes], in pages that are no part of the heap and go with the tensor. Raises OSError where
    there is no memory."""
    how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)  # faults, all at once, are cheaper
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=how), dtype=torch.uint8)


def bound_code(nbytes: int) -> None:
    """Have oneDNN and torch keep what they made for as many shapes of products as take about `nbytes`, where a process
    has not yet multiplied: they look once. What a person has set holds."""
    for name in CACHES:
        os.environ.setdefault(name, str(min(1024, max(8, nbytes // SHAPE))))


def drop(layer: nn.Module) -> None:
    """Put the layer's parameters back on the meta device; buffers stay: they are small, and not all are in the file."""
    for part in layer.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


_DRAWN = (torch.Tensor.normal_, torch.Tensor.uniform_)


class Unfilled(TorchFunctionMode):
    """torch.empty, of which parameters are made, gives no memory, and what has none draws no random numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.empty and given.get("device") is None:
            given = {**given, "device": "meta"}
        if func in _DRAWN and args and args[0].is_meta:
            return args[0]
        return func(*args, **given)
