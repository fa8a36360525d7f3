"""Experts that lose channels: rows of gate and up, columns of down; and shared experts whose width follows theirs.

They are columns of matrices in the source's files, which `csrc/io` gathers: none is read here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moekern.architectures import ExpertTensor, Layout, MoeLayer
from moekern.checkpoint.dtypes import decode
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import DTYPE_BITS, TensorEntry
from moekern.errors import InputError
from moekern.plan.channels import channel_ids, channel_text
from moekern.plan.document import Plan
from moekern.pruning.pieces import Columns, Computed, computed, recipe

BLOCK = 1 << 20  # numbers whose squares are summed at a time


@dataclass(frozen=True)
class Narrow:
    """What stays of the `width` channels of a layer's experts: a text for each one that is kept, by its number. coded:
    they are quantised, and what stays of them is computed."""

    width: int
    texts: Mapping[int, str]
    left: int  # M
    coded: bool = False

    def places(self, tensor: ExpertTensor, expert: int) -> np.ndarray:
        """Where they lie along the channels of one expert's matrix, int64. Experts past the routed ones, which stand
        for none, keep the first."""
        ids = channel_ids(self.texts[expert]) if expert in self.texts else np.arange(self.left)
        if tensor.channel_form == "halves":
            return np.concatenate([ids, self.width + ids])
        return np.stack([2 * ids, 2 * ids + 1], 1).ravel() if tensor.channel_form == "alternating" else ids


@dataclass(frozen=True, slots=True)
class Widened:
    """A shared expert's tensor that has `size` channels along `axis` in the end: zeros follow its own."""

    axis: int
    size: int


def narrowed_layers(
    checkpoint: Checkpoint, layout: Layout, plan: Plan, kept: Mapping[str, Sequence[int]]
) -> dict[str, Narrow]:
    """Layer key -> what stays of the channels, for layers that are cut; none where experts stay whole, which a plan may
    say by naming all of their channels. Layers that the plan does not name (MTP) keep the `strongest_channels`."""
    if plan.width is None or plan.width == layout.width:
        return {}
    found = {}
    for key, layer in {**layout.layers, **layout.mtp}.items():
        if key not in kept:
            continue
        assert layer.width is not None
        given = plan.layers.get(key)
        if layer.step:
            found[key] = Narrow(layer.width, {}, plan.width, coded=True)
            continue
        if given is not None and given.channels is not None:
            texts = dict(zip(given.keep, given.channels, strict=True))
        else:
            texts = strongest_channels(checkpoint, layer, kept[key], plan.width)
        found[key] = Narrow(layer.width, texts, plan.width)
    return found


def strongest_channels(checkpoint: Checkpoint, layer: MoeLayer, keep: Sequence[int], width: int) -> dict[int, str]:
    """Of each expert the `width` channels with the largest product of squared norms of its rows of gate and up and its
    column of down, in float64; the lowest number wins a tie. Biases do not count."""
    assert layer.width is not None
    energy = {expert: np.ones(layer.width) for expert in keep}
    for tensor in layer.of_role("expert"):
        entry = checkpoint.tensors[tensor.name]
        if tensor.channel_axis is None or len(expert_matrix(tensor, entry)) != 2:
            continue
        for expert in keep if tensor.expert is None else [tensor.expert] if tensor.expert in energy else []:
            rows = np.moveaxis(_numbers(checkpoint, tensor, entry, expert), expert_axis(tensor), 0)
            square = _energies(rows)
            if tensor.projection == "gate_up":
                pairs = square.reshape(-1, 2) if tensor.channel_form == "alternating" else square.reshape(2, -1).T
                square = pairs.prod(1)
            energy[expert] *= square
    for expert, values in energy.items():
        if not np.isfinite(values).all():
            what = f"{layer.prefix}: expert {expert}: weights that are not finite rank no channels"
            raise InputError(f"{checkpoint.folder}: {what}; use --mtp drop")
    best = {e: np.sort(np.argsort(-values, kind="stable")[:width]) for e, values in energy.items()}
    return {expert: channel_text(ids, layer.width) for expert, ids in best.items()}


def _energies(rows: np.ndarray) -> np.ndarray:
    """Sums of squares of the rows of [n, m], float64: the same bits in whatever order a row's numbers stand.

    Squares are parted into multiples of a power of two, whose sum is exact, and what is left; that once more.
    """
    out, step, bits = np.zeros(len(rows)), max(1, BLOCK // max(1, rows.shape[1])), rows.shape[1].bit_length()
    for start in range(0, len(rows), step):
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are told by whoever ranks
            left = np.square(rows[start : start + step].astype(np.float64))
            for _ in range(2):
                unit = np.ldexp(1.5, np.frexp(np.abs(left).max(1, initial=0))[1] + bits)[:, None]
                part = (left + unit) - unit
                out[start : start + step] += part.sum(1)
                left -= part
    return out


def widened(layout: Layout, layer: MoeLayer, width: int) -> dict[str, Widened]:
    """Name -> what becomes of the shared expert's tensors, where experts have `width` channels."""
    if not layout.shared_times or layer.width is None:
        return {}
    size = -(-layout.shared_times * layer.width // width) * width
    if size == layout.shared_times * layer.width:
        return {}
    return {tensor.name: Widened(tensor.axis, size) for tensor in layer.shared if tensor.axis is not None}


def narrow_shape(entry: TensorEntry, tensor: ExpertTensor, narrow: Narrow, shape: Sequence[int]) -> tuple[int, ...]:
    """`shape`, which a tensor has with fewer experts, with fewer channels."""
    assert tensor.channel_axis is not None
    out = list(shape)
    if tensor.rows > 1:
        out[0] = shape[0] // tensor.rows * narrow.left
    else:
        out[tensor.channel_axis] = out[tensor.channel_axis] * narrow.left // narrow.width  # of scales whole blocks
    return tuple(out)


def narrow_pieces(
    checkpoint: Checkpoint, entry: TensorEntry, tensor: ExpertTensor, narrow: Narrow, kept: Sequence[int]
) -> Iterator[Columns]:
    """The bytes of a tensor, one expert after another; `kept` are those that a stack keeps."""
    shape, axis = expert_matrix(tensor, entry), expert_axis(tensor)
    rows, column_bytes = math.prod(shape[:axis]), math.prod(shape[axis + 1 :]) * DTYPE_BITS[entry.dtype] // 8
    for expert in kept if tensor.expert is None else (tensor.expert,):
        start, _ = expert_place(tensor, entry, expert)
        places = narrow.places(tensor, expert).astype(np.int64).tobytes()
        yield Columns(str(checkpoint.folder / entry.shard), start, rows, shape[axis], column_bytes, places)


def widened_piece(checkpoint: Checkpoint, name: str, entry: TensorEntry, wide: Widened, nbytes: int) -> Computed:
    """The bytes of a shared expert's tensor."""
    source = (str(checkpoint.folder / entry.shard), entry.start, entry.nbytes)
    digest = recipe("widened", [source], shape=entry.shape, dtype=entry.dtype, axis=wide.axis, size=wide.size)

    def make() -> bytes:
        rows = np.frombuffer(checkpoint.read(entry.name), _item(entry)).reshape(entry.shape)
        more = [(0, wide.size - n if axis == wide.axis else 0) for axis, n in enumerate(entry.shape)]
        return np.pad(rows, more).tobytes()

    return computed(name, digest, nbytes, make)


def _stacked(tensor: ExpertTensor) -> bool:
    """Whether experts have an axis of their own."""
    return tensor.expert is None and tensor.rows == 1


def expert_axis(tensor: ExpertTensor) -> int:
    """The axis of one expert's matrix that is its channels."""
    assert tensor.channel_axis is not None
    return tensor.channel_axis - _stacked(tensor)


def expert_matrix(tensor: ExpertTensor, entry: TensorEntry) -> tuple[int, ...]:
    """The shape of one expert's part."""
    if tensor.expert is not None:
        return entry.shape
    return (tensor.rows, *entry.shape[1:]) if tensor.rows > 1 else entry.shape[1:]


def expert_place(tensor: ExpertTensor, entry: TensorEntry, expert: int) -> tuple[int, int]:
    """First byte and number of bytes of one expert's part in the source file."""
    if tensor.expert is not None:
        return entry.start, entry.nbytes
    size = math.prod(expert_matrix(tensor, entry)) * DTYPE_BITS[entry.dtype] // 8
    return entry.start + expert * size, size


def _item(entry: TensorEntry) -> np.dtype:
    """An element as bytes that are only moved."""
    return np.dtype(f"V{DTYPE_BITS[entry.dtype] // 8}")


def _numbers(checkpoint: Checkpoint, tensor: ExpertTensor, entry: TensorEntry, expert: int) -> np.ndarray:
    data = checkpoint.read_data(checkpoint.folder / entry.shard, entry, *expert_place(tensor, entry, expert))
    return decode(data, entry.dtype).reshape(expert_matrix(tensor, entry))
