"""Bytes and numbers of a model's skeleton and of each decoder layer, from the checkpoint's headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from moekern.architectures.layout import Layout
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import TensorEntry

COMPANION = re.compile(r"scale|zero_point|qzeros|g_idx|weight_shape")  # of a quantised weight, gone once it is plain
PACKED = {"U8": 2, "I8": 1, "I32": 8, "U32": 8}  # weights in each stored number: 4 bits apiece, as all of them are


@dataclass(frozen=True, slots=True)
class Size:
    """Of some tensors: bytes as they are stored, and weights once they are plain numbers."""

    stored: int = 0
    weights: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.stored + other.stored, self.weights + other.weights)


@dataclass(frozen=True)
class Sizes:
    """What is resident throughout, and what a layer at a time is; layers that predict further tokens are not run."""

    skeleton: Size
    layers: Mapping[int, Size]  # decoder layer -> its tensors

    @property
    def largest(self) -> Size:
        """The most of each that any layer has."""
        layers = self.layers.values()
        return Size(max((n.stored for n in layers), default=0), max((n.weights for n in layers), default=0))


def sizes_of(checkpoint: Checkpoint, layout: Layout) -> Sizes:
    """Sizes of the stack that holds the experts; every tensor outside of it, MTP layers aside, is the skeleton's."""
    stacks = {layer.prefix.rpartition(".")[0] for layer in layout.layers.values()}
    inside = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(stacks)))})\.(\d+)\.")
    skeleton, layers = Size(), dict[int, Size]()
    for name, entry in checkpoint.tensors.items():
        if layout.mtp_prefixes and name.startswith(layout.mtp_prefixes):
            continue
        found = inside.match(name)
        if found is None:
            skeleton += size_of(entry)
        else:
            layers[int(found[1])] = layers.get(int(found[1]), Size()) + size_of(entry)
    return Sizes(skeleton, dict(sorted(layers.items())))


def size_of(entry: TensorEntry) -> Size:
    """Of one tensor."""
    if COMPANION.search(entry.name.rpartition(".")[2]):
        return Size(entry.nbytes)
    quantised = len(entry.shape) > 1  # the ids of a table of integers are few
    return Size(entry.nbytes, math.prod(entry.shape) * (PACKED.get(entry.dtype, 1) if quantised else 1))
