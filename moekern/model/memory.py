"""Give freed memory back to the system."""

import ctypes
from collections.abc import Callable


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
