"""What a refit takes beside the pass that it is: bytes of rows and of refitted layers, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moekern.architectures import Layout
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import DTYPE_BITS

HELD, MOST = 0.1, 8192  # share of the tokens that a result is judged by, and the most of a domain
RIDGE, REFINE = 6, 17  # forward passes of the experts that these are worth; 5 to 7 and 15 to 18 measured on a CPU
FACTORS = 3  # candidates of the ridge, each with a copy of the residual and of the down projections
SWEEPS, EPOCHS, BATCH = 2, 3, 1024  # of refinement, which `refit.Refine` has too
NUMBERS = 24  # bytes of memory for a row that an expert has: its number, its gate, and its places among all rows
STEP = 1.5e-3  # seconds of one of its steps beside the products; 1 to 3 ms measured on a CPU


def refine_steps(tokens: int, top_k: int, kept: Mapping[str, int]) -> int:
    """Steps of Adam for `kept` experts of each layer, whose tokens are spread evenly."""
    fitted = (1 - HELD) ** 2 * tokens * top_k
    return sum(SWEEPS * EPOCHS * count * max(1, math.ceil(fitted / count / BATCH)) for count in kept.values())


def row_bytes(tokens: int, hidden: int, itemsize: int, copies: int = FACTORS) -> int:
    """Bytes of a layer's rows [tokens, hidden]: the target, what lacks of it and `copies` of that, in float32, and what
    experts are given."""
    return tokens * hidden * (4 * (2 + copies) + itemsize)


def numbers_bytes(tokens: int, top_k: int) -> int:
    """Bytes of memory that say which rows experts have."""
    return NUMBERS * tokens * top_k


def refitted_bytes(
    checkpoint: Checkpoint,
    layout: Layout,
    kept: Mapping[str, int],
    *,
    all_parts: bool,
    width: int | None = None,
    dtype: str | None = None,
) -> int:
    """Bytes of the tensors that a refit computes: of `kept` experts of each layer the down projections, or `all_parts`.

    width: channels that experts keep (None: all). dtype: that of safetensors which they become (None: the source's).
    """
    bits = 0
    for key, count in kept.items():
        layer, found = layout.layers[key], 0
        routed = (t for t in layer.refitted(all_parts=all_parts) if t.expert is None or t.expert < layer.num_experts)
        for tensor in routed:
            entry = checkpoint.tensors[tensor.name]
            own = 8 * entry.nbytes
            if dtype is not None:
                own = own * DTYPE_BITS[dtype] // DTYPE_BITS[entry.dtype]
            if width is not None and layer.width and tensor.channel_axis is not None:
                own = own * width // layer.width
            found += own
        bits += found * count // layer.num_experts
    return bits // 8
