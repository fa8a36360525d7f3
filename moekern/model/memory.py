"""Let weights go, and give freed memory back to the system."""

import ctypes
from collections.abc import Callable

import torch
from torch import nn


def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


_trim = _malloc_trim()


def return_freed_memory() -> None:
    """Hand the C library's free pages back, where it is glibc; elsewhere nothing happens.

    A layer's tensors are many and small enough to come from the heap, which glibc keeps when they are freed: without
    this, resident memory grew with every layer (from 1.2 to 2.2 GB over twelve layers of 0.2 GB).
    """
    if _trim is not None:
        _trim(0)


def drop(layer: nn.Module) -> None:
    """Put the layer's parameters back on the meta device; buffers stay: they are small, and not all are in the file."""
    for part in layer.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
