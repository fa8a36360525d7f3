"""The quantised twin of a model: routed experts rounded to the nearest of 2^bits levels, group by group.

The simplest rounding there is, and no product of a quantiser: of each `group` numbers that follow one another in a row
as it is stored, the least and the largest (and zero between them) give a 16-bit scale and a zero point of `bits` bits.
The numbers that come back are written in the checkpoint's own dtype; counted are the codes, scales and zero points.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from moekern.architectures import find_layout
from moekern.checkpoint.dtypes import decode, encode
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.writing import write_tensors
from moekern.pruning.replaced import write_replaced

SCALE_BITS = 16


def rounded(values: np.ndarray, bits: int, group: int) -> np.ndarray:
    """float32 [..., n], each group of the last axis (the last may be shorter) rounded to its own levels."""
    n = values.shape[-1]
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -n % group)], mode="edge")
    parts = padded.reshape(*padded.shape[:-1], -1, group)
    low, high = np.minimum(parts.min(-1, keepdims=True), 0), np.maximum(parts.max(-1, keepdims=True), 0)
    levels = 2**bits - 1
    scale = ((high - low) / levels).astype(np.float16).astype(np.float32)
    safe = np.where(scale == 0, 1, scale)
    zero = np.rint(-low / safe).clip(0, levels)
    codes = (np.rint(parts / safe) + zero).clip(0, levels)
    found = np.where(scale == 0, 0, (codes - zero) * safe)
    return found.reshape(padded.shape)[..., :n].astype(np.float32)


def twin(checkpoint: Checkpoint, out: Path, work: Path, bits: int, group: int) -> float:
    """Write the twin to `out`, one layer of experts in memory, and return the bits that it takes for each routed
    weight. Vectors, such as biases, stay as they are, and their bits count. `work`: a new folder."""
    work.mkdir(parents=True)
    total = numbers = 0
    for key, layer in find_layout(checkpoint).layers.items():
        made = {}
        for tensor in layer.of_role("expert"):
            entry = checkpoint.tensors[tensor.name]
            size = math.prod(entry.shape)
            numbers += size
            if tensor.is_bias or len(entry.shape) < 2:
                total += 8 * entry.nbytes
                continue
            values = decode(checkpoint.read(tensor.name), entry.dtype).astype(np.float32).reshape(entry.shape)
            made[tensor.name] = (entry.dtype, entry.shape, encode(rounded(values, bits, group), entry.dtype))
            total += size * bits + size // entry.shape[-1] * -(-entry.shape[-1] // group) * (SCALE_BITS + bits)
        write_tensors(work / f"{key}.safetensors", made, {})
    write_replaced(checkpoint, out, work, {"rounded": {"bits": bits, "group": group}})
    return total / numbers
