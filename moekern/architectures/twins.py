"""Twins: one model stored in several formats. Quantisers leave routers alone, so a few of their numbers tell it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from moekern.architectures.layout import Layout
from moekern.checkpoint.dtypes import decode
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import DTYPE_BITS

NUMBERS = 16  # of each router, from its middle
PLAIN = ("F32", "BF16", "F16")
SAMPLE = re.compile(r"(F32|BF16|F16) (\d+(?:x\d+)*) ((?:[0-9a-f]{4}){1,32})")


def router_numbers(checkpoint: Checkpoint, layout: Layout) -> dict[str, str]:
    """Layer key -> "DTYPE SHAPE HEX": the bytes of NUMBERS numbers from the middle of its largest router tensor.

    Layers whose routers are not stored as plain floats are left out. Raises InputError for a file that has shrunk.
    """
    found = {}
    for key, layer in layout.layers.items():
        entries = [checkpoint.tensors[tensor.name] for tensor in layer.of_role("router")]
        plain = [entry for entry in entries if entry.dtype in PLAIN and entry.nbytes]
        if plain:
            entry = max(plain, key=lambda e: (e.nbytes, e.name))
            size = DTYPE_BITS[entry.dtype] // 8
            total = entry.nbytes // size
            numbers = min(NUMBERS, total)
            start = entry.start + (total - numbers) // 2 * size
            data = checkpoint.read_data(checkpoint.folder / entry.shard, entry, start, numbers * size)
            found[key] = f"{entry.dtype} {'x'.join(map(str, entry.shape))} {data.hex()}"
    return found


def same_routers(first: object, second: object) -> bool:
    """Whether two models' `router_numbers` are those of one model: in every layer the same bytes, or what rounding
    from one type to the other makes of them. False where either knows nothing, or is no such table."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return False
    return bool(first) and first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)


def _same(first: object, second: object) -> bool:
    a, b = (SAMPLE.fullmatch(text) if isinstance(text, str) else None for text in (first, second))
    if a is None or b is None or a[2] != b[2]:
        return False
    if a[1] == b[1]:
        return a[3] == b[3]
    try:
        x, y = decode(bytes.fromhex(a[3]), a[1]), decode(bytes.fromhex(b[3]), b[1])
    except ValueError:  # an odd number of bytes
        return False
    return np.array_equal(_rounded(x, b[1]), y) or np.array_equal(_rounded(y, a[1]), x)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Floats as float32 numbers of another type, rounded to the nearest, ties to even."""
    values = values.astype(np.float32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return (bits + 0x7FFF + (bits >> 16 & 1) & np.uint32(0xFFFF0000)).view(np.float32)
    return values
