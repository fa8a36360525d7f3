"""A plan and a checkpoint's layout give the files to write: a header each, and the byte ranges that follow it."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from moekern.architectures import ExpertTensor, Layout, MoeLayer
from moekern.checkpoint import DTYPE_BITS, Checkpoint, Shard, TensorEntry
from moekern.errors import InputError
from moekern.plan import Plan

Mtp = Literal["prune", "drop", "keep"]
MTP_MODES: tuple[Mtp, ...] = ("prune", "drop", "keep")
Piece = tuple[str, int, int] | bytes  # (source file, offset, length), or the bytes themselves


@dataclass(frozen=True, slots=True)
class Cut:
    """What happens to one tensor with experts, in a layer of `num_experts`. rank: kept id -> new id, rising in both."""

    tensor: ExpertTensor
    rank: Mapping[int, int]
    num_experts: int

    def new_number(self) -> int | None:
        """The number of this tensor's expert in the result; None when it is dropped. Numbers past the routed experts'
        (transformers writes such for LongCat's zero experts) stay past them."""
        expert = self.tensor.expert
        if expert is None or expert < self.num_experts:
            return None if expert is None else self.rank.get(expert)
        return expert - self.num_experts + len(self.rank)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor to write: `entry` of the source, whole when `cut` is None."""

    name: str
    shape: tuple[int, ...]
    entry: TensorEntry
    cut: Cut | None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BITS[self.entry.dtype] // 8


@dataclass(frozen=True)
class OutputShard:
    """One file to write, made from one file of the source."""

    name: str
    source: Shard
    tensors: tuple[OutputTensor, ...]

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def header(self) -> bytes:
        """Length and JSON, padded with spaces to a multiple of 8 bytes. The source's metadata is kept."""
        content: dict[str, Any] = {"__metadata__": self.source.metadata} if self.source.metadata else {}
        offset = 0
        for tensor in self.tensors:
            stop = offset + tensor.nbytes
            content[tensor.name] = {
                "dtype": tensor.entry.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, stop],
            }
            offset = stop
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def pieces(self, checkpoint: Checkpoint) -> list[Piece]:
        """Header and data in file order. Ranges that touch in the source are joined; small tensors that have to be
        computed (tables of expert ids, rows cut on an inner axis) are read from `checkpoint` and held as bytes."""
        pieces: list[Piece] = [self.header()]
        path = str(self.source.path)
        for tensor in self.tensors:
            for piece in _tensor_pieces(tensor, path, checkpoint):
                last = pieces[-1]
                if isinstance(piece, tuple) and isinstance(last, tuple) and last[1] + last[2] == piece[1]:
                    pieces[-1] = (path, last[1], last[2] + piece[2])
                else:
                    pieces.append(piece)
        return pieces


def output_shards(
    checkpoint: Checkpoint, layout: Layout, kept: Mapping[str, Sequence[int]], mtp: Mtp
) -> tuple[OutputShard, ...]:
    """The files to write: one for each source file that keeps a tensor, in the source's order.

    `kept` maps layer keys to original ids; layers it does not name are copied whole. Names stay when no file falls
    away, else they are numbered anew. Raises InputError for a tensor whose shape does not hold its layer's experts
    and for a cut that would split a byte.
    """
    cuts: dict[str, Cut] = {}
    for key, layer in {**layout.layers, **layout.mtp}.items():
        if key in kept:
            rank = {old: new for new, old in enumerate(sorted(kept[key]))}
            cuts.update((tensor.name, Cut(tensor, rank, layer.num_experts)) for tensor in layer.tensors)
    dropped = layout.mtp_prefixes if mtp == "drop" else ()
    made = []
    for shard in checkpoint.shards:
        live = [entry for entry in shard.tensors if not (dropped and entry.name.startswith(dropped))]
        tensors = tuple(_ordered([out for entry in live if (out := _output_tensor(entry, cuts.get(entry.name)))]))
        if tensors:
            made.append(OutputShard(shard.name, shard, tensors))
    if len(made) == len(checkpoint.shards):
        return tuple(made)
    if not checkpoint.index and len(made) == 1:
        return (replace(made[0], name="model.safetensors"),)
    return tuple(
        replace(shard, name=f"model-{number:05d}-of-{len(made):05d}.safetensors")
        for number, shard in enumerate(made, 1)
    )


def kept_experts(checkpoint: Checkpoint, layout: Layout, plan: Plan, mtp: Mtp) -> dict[str, tuple[int, ...]]:
    """Layer key -> original ids that stay, for every layer that is cut.

    With mtp="prune" the MTP layers are among them. Calibration never runs these, so a plan rarely names them: then they
    keep as many experts as the others, the `strongest`.
    """
    kept = {key: tuple(sorted(plan.layers[key].keep)) for key in layout.layers}
    if mtp == "prune":
        count = max(map(len, kept.values()))
        for key, layer in layout.mtp.items():
            given = plan.layers.get(key)
            kept[key] = tuple(sorted(given.keep)) if given else strongest(checkpoint, layer, count, layout.n_group)
    return kept


def strongest(checkpoint: Checkpoint, layer: MoeLayer, count: int, n_group: int) -> tuple[int, ...]:
    """The `count` experts whose router rows have the largest L2 norm, the same number in each of `n_group` groups.

    Norms are compared by their squares, summed exactly (math.fsum); the lowest id wins a tie.
    """
    routers = [tensor for tensor in layer.tensors if tensor.role == "router" and tensor.action == "slice"]
    if not routers:
        raise InputError(f"{layer.prefix}: no router is known to rank its experts by; use --mtp drop or --mtp keep")
    energy = [0.0] * layer.num_experts
    for tensor in routers:
        rows = np.moveaxis(checkpoint.array(tensor.name).astype(np.float64), tensor.axis, 0)
        for expert in range(layer.num_experts):
            row = rows[expert * tensor.rows : (expert + 1) * tensor.rows]
            energy[expert] += math.fsum(np.square(row).ravel().tolist())
    size = layer.num_experts // n_group
    chosen: list[int] = []
    for group in range(n_group):
        members = sorted(range(group * size, (group + 1) * size), key=lambda e: (-energy[e], e))
        chosen += members[: count // n_group]
    return tuple(sorted(chosen))


def replace_experts(table: np.ndarray, keep: Sequence[int], num_experts: int) -> np.ndarray:
    """A table of expert ids [..., K] with the ids numbered anew and those of dropped experts replaced.

    Hash layers (DeepSeek V4's tid2eid) give each token a fixed list of experts, which no score ranks, so a dropped
    expert's tokens are spread evenly: id d becomes the kept expert of rank d * kept // E, or the next rank, cyclically,
    that the token does not use yet. Slots are filled from left to right. Same shape and dtype as `table`.
    """
    ids = table.reshape(-1, table.shape[-1] if table.ndim else 1).astype(np.int64)
    rank = np.full(num_experts, -1, np.int64)
    rank[list(keep)] = np.arange(len(keep))
    out = rank[ids]
    for slot in range(ids.shape[1]):
        rows = np.flatnonzero(out[:, slot] < 0)
        choice = ids[rows, slot] * len(keep) // num_experts
        for _ in keep:
            used = (out[rows] == choice[:, None]).any(axis=1)
            choice[used] = (choice[used] + 1) % len(keep)
        out[rows, slot] = choice
    return out.reshape(table.shape).astype(table.dtype)


def _output_tensor(entry: TensorEntry, cut: Cut | None) -> OutputTensor | None:
    """What becomes of a tensor of the source; None when its expert is dropped."""
    if cut is None:
        return OutputTensor(entry.name, entry.shape, entry, None)
    if cut.tensor.action == "drop":
        new = cut.new_number()
        return None if new is None else OutputTensor(cut.tensor.renamed(new), entry.shape, entry, None)
    if cut.tensor.action == "remap":
        return OutputTensor(entry.name, entry.shape, entry, cut)
    axis, rows, trailing = cut.tensor.axis, cut.tensor.rows, cut.tensor.trailing
    expected = cut.num_experts * rows + trailing
    if axis >= len(entry.shape) or entry.shape[axis] != expected:
        raise InputError(
            f"{entry.shard}: {entry.name} has shape {list(entry.shape)}; expected {expected} on axis {axis} "
            f"for {cut.num_experts} experts"
        )
    row_bits = math.prod(entry.shape[axis + 1 :]) * DTYPE_BITS[entry.dtype]
    if rows * row_bits % 8 or trailing * row_bits % 8:
        raise InputError(f"{entry.shard}: {entry.name} ({entry.dtype}): an expert's rows are not whole bytes")
    shape = (*entry.shape[:axis], len(cut.rank) * rows + trailing, *entry.shape[axis + 1 :])
    return OutputTensor(entry.name, shape, entry, cut)


def _ordered(tensors: list[OutputTensor]) -> list[OutputTensor]:
    """The source's order, unless a cut to an odd length would leave a later tensor off its natural alignment: then
    wide elements first, since readers that map the file need aligned tensors and the format allows no gaps."""
    offset = 0
    for tensor in tensors:
        if offset % _item_bytes(tensor):
            return sorted(tensors, key=_item_bytes, reverse=True)
        offset += tensor.nbytes
    return tensors


def _item_bytes(tensor: OutputTensor) -> int:
    return max(1, DTYPE_BITS[tensor.entry.dtype] // 8)


def _tensor_pieces(tensor: OutputTensor, path: str, checkpoint: Checkpoint) -> Iterable[Piece]:
    entry, cut = tensor.entry, tensor.cut
    if not tensor.nbytes:
        return
    if cut is None:
        yield path, entry.start, entry.stop - entry.start
        return
    if cut.tensor.action == "remap":
        yield _remapped(cut, checkpoint)
        return
    axis = cut.tensor.axis
    row_bits = math.prod(entry.shape[axis + 1 :]) * DTYPE_BITS[entry.dtype]
    runs = [(start * row_bits // 8, stop * row_bits // 8) for start, stop in _row_runs(cut)]
    outer = math.prod(entry.shape[:axis])
    if outer == 1:
        for start, stop in runs:
            yield path, entry.start + start, stop - start
        return
    data = np.frombuffer(checkpoint.read(entry.name), np.uint8).reshape(outer, -1)
    yield np.concatenate([data[:, start:stop] for start, stop in runs], axis=1).tobytes()


def _row_runs(cut: Cut) -> list[tuple[int, int]]:
    """Kept rows along the expert axis as (first, past the last), joined where they touch."""
    rows = cut.tensor.rows
    spans = [(expert * rows, (expert + 1) * rows) for expert in cut.rank]
    if cut.tensor.trailing:
        spans.append((cut.num_experts * rows, cut.num_experts * rows + cut.tensor.trailing))
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _remapped(cut: Cut, checkpoint: Checkpoint) -> bytes:
    table = checkpoint.array(cut.tensor.name)
    if table.dtype.kind not in "iu" or (table.size and not (table.min() >= 0 and table.max() < cut.num_experts)):
        raise InputError(f"{cut.tensor.name}: expected expert numbers from 0 to {cut.num_experts - 1}")
    return replace_experts(table, tuple(cut.rank), cut.num_experts).tobytes()
