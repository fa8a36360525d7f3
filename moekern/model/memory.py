"""Take no memory for weights before they are there, keep them apart, let them go, and give freed memory back."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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


def pages(nbytes: int, file: int = -1, *, lasting: bool = False) -> Tensor:
    """[nbytes] uint8 of zeros that begin with a page, of no file or of an open one that processes share. They go when
    the last tensor that lies in them is freed. `lasting`: huge pages are worth the search. Raises OSError where there
    is no memory."""
    kind = mmap.MAP_SHARED if file >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if file < 0 and not lasting:
        kind |= getattr(mmap, "MAP_POPULATE", 0)  # page faults, all at once, are cheaper
    memory = mmap.mmap(file, max(nbytes, 1), flags=kind)
    if lasting and hasattr(mmap, "MADV_HUGEPAGE"):  # fewer page faults
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def room_for(shape: Sequence[int], dtype: torch.dtype, device: torch.device, large: int = LARGE) -> Tensor:
    """As torch.empty; on the CPU in pages of its own where it has so many bytes."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < large:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return pages(nbytes).view(dtype).view(*shape)


def twin(module: nn.Module, known: dict[int, nn.Module] | None = None) -> nn.Module:
    """A module with modules of its own that hold the same tensors: what is put into it is not in the first one."""
    known = {} if known is None else known
    if id(module) not in known:
        known[id(module)] = made = shallow(module)
        for name, part in module._modules.items():
            made._modules[name] = None if part is None else twin(part, known)
    return known[id(module)]


def shallow(module: nn.Module) -> nn.Module:
    """The same with dictionaries of its own, in which the same modules, parameters and buffers stand."""
    made = type(module).__new__(type(module))
    made.__dict__ |= vars(module)
    for kind in ("_modules", "_parameters", "_buffers"):
        made.__dict__[kind] = dict(vars(module)[kind])
    return made


def with_layer_alone(model: nn.Module, layers_name: str, i: int, layer: nn.Module) -> nn.Module:
    """A model that has this one as its i-th decoder layer, no other, and all else of `model`."""
    made = part = shallow(model)
    for name in layers_name.split("."):
        below = shallow(part.get_submodule(name))
        part._modules[name] = below
        part = below
    part._modules = {str(i): layer}
    return made


def hand_over(made: nn.Module, layer: nn.Module) -> None:
    """Let a layer have what was put into its twin."""
    for own, part in zip(made.modules(), layer.modules(), strict=True):
        part._parameters |= own._parameters
        part._buffers |= own._buffers


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
