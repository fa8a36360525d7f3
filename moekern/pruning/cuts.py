"""What becomes of each tensor when experts go: dropped, renamed, cut along its expert axis, or remapped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from moekern.architectures import ExpertTensor, Layout, MoeLayer
from moekern.architectures.id_tables import replace_experts
from moekern.architectures.widths import mtp_problem
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import DTYPE_BITS, TensorEntry
from moekern.errors import InputError
from moekern.plan.document import Mtp, Plan
from moekern.pruning.constants import Constant
from moekern.pruning.narrow import Narrow, Widened, narrow_pieces, narrow_shape, widened_piece
from moekern.pruning.pieces import Columns, Computed, computed, recipe
from moekern.pruning.refitted import NewTensor

Range = tuple[int, int]  # first byte and the byte past the last, in the source file
SMALL = 16 << 20  # a tensor up to this many bytes may be read whole and cut in memory


@dataclass(frozen=True, slots=True)
class Cut:
    """What happens to one tensor with experts, in a layer of `num_experts`. rank: kept id -> new id, rising in both.
    narrow: what stays of its channels; None where all do."""

    tensor: ExpertTensor
    rank: Mapping[int, int]
    num_experts: int
    narrow: Narrow | None = None

    def new_number(self) -> int | None:
        """The number of this tensor's expert in the result; None when it is dropped. Numbers past the routed experts'
        (transformers writes such for LongCat's zero experts) stay past them."""
        expert = self.tensor.expert
        if expert is None or expert < self.num_experts:
            return None if expert is None else self.rank.get(expert)
        return expert - self.num_experts + len(self.rank)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor to write: `entry` of the source, whole when `cut` is None; or the `new` one in its place."""

    name: str
    shape: tuple[int, ...]
    entry: TensorEntry
    cut: Cut | Widened | Constant | None
    new: NewTensor | None = None

    @property
    def dtype(self) -> str:
        return (self.new or self).entry.dtype

    @property
    def file(self) -> str:
        """The file that its bytes come from, by its path from the source's folder on."""
        return self.entry.shard if self.new is None else str(self.new.path)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BITS[self.dtype] // 8

    def ranges(self) -> tuple[Range, ...] | None:
        """Where its bytes lie in `file`, in their order here; None where they are computed."""
        entry, cut = self.entry, self.cut
        if self.is_computed:
            return None
        if not self.nbytes:
            return ()
        if self.new is not None:
            return ((self.new.entry.start, self.new.entry.stop),)
        if cut is None:
            return ((entry.start, entry.stop),)
        assert isinstance(cut, Cut)
        stride = entry.nbytes // math.prod(entry.shape[: cut.tensor.axis])
        starts = range(entry.start, entry.stop, stride)
        return tuple((at + start, at + stop) for at in starts for start, stop in _row_bytes(entry, cut))

    @property
    def is_computed(self) -> bool:
        """Tables of expert ids are, and what would be many ranges: channels, and rows of a small tensor that is cut on
        an inner axis; what zeros are added to; and the constants of replaced experts."""
        if self.cut is None or self.new is not None or not self.nbytes:
            return False
        if isinstance(self.cut, (Widened, Constant)) or self.cut.narrow is not None:
            return True
        outer = math.prod(self.entry.shape[: self.cut.tensor.axis])
        return self.cut.tensor.action == "remap" or (outer > 1 and self.entry.nbytes <= SMALL)

    def computed(self, checkpoint: Checkpoint) -> Iterator[Computed | Columns]:
        """The pieces of a tensor that is no ranges."""
        entry, cut = self.entry, self.cut
        assert cut is not None
        if isinstance(cut, Widened):
            yield widened_piece(checkpoint, self.name, entry, cut, self.nbytes)
            return
        if isinstance(cut, Constant):
            yield cut.piece(entry, self.elements)
            return
        tensor = cut.tensor
        if cut.narrow is not None:
            yield from narrow_pieces(checkpoint, entry, tensor, cut.narrow, tuple(cut.rank))
            return
        digest = recipe(
            tensor.action,
            [(str(checkpoint.folder / entry.shard), entry.start, entry.nbytes)],
            kept=tuple(cut.rank),
            num_experts=cut.num_experts,
            dtype=entry.dtype,
            shape=entry.shape,
            rows=(tensor.axis, tensor.rows, tensor.trailing),
        )
        make = _remapped if tensor.action == "remap" else _inner_rows
        yield computed(self.name, digest, self.nbytes, lambda: make(entry, cut, checkpoint))


def check_tables(checkpoint: Checkpoint, tensors: Iterable[OutputTensor]) -> None:
    """Raise InputError for a table of expert ids that holds something else: known before anything is written."""
    for tensor in tensors:
        if isinstance(tensor.cut, Cut) and tensor.cut.tensor.action == "remap":
            _table(tensor.entry, tensor.cut, checkpoint)


def kept_experts(checkpoint: Checkpoint, layout: Layout, plan: Plan, mtp: Mtp) -> dict[str, tuple[int, ...]]:
    """Layer key -> original ids that stay, for every layer that is cut.

    With mtp="prune" the MTP layers are among them. Calibration never runs these, so a plan rarely names them: then they
    keep as many experts as the others, the `strongest`.
    """
    kept = {key: tuple(sorted(plan.layers[key].keep)) for key in layout.layers}
    check_mtp(layout, mtp, narrower=plan.width not in (None, layout.width))
    if mtp == "prune":
        count = max(map(len, kept.values()))
        for key, layer in layout.mtp.items():
            given = plan.layers.get(key)
            kept[key] = tuple(sorted(given.keep)) if given else strongest(checkpoint, layer, count, layout.n_group)
    return kept


def check_mtp(layout: Layout, mtp: Mtp, *, narrower: bool) -> None:
    """Raise InputError for MTP layers that cannot become what `narrower` experts in other layers ask of them."""
    if not layout.mtp or not narrower:
        return
    if mtp == "keep":
        what = "config.json has one width for all layers, and the experts of others lose channels"
        instead = "use --mtp drop" if mtp_problem(layout) else "use --mtp prune or --mtp drop"
        raise InputError(f"--mtp keep: {what}; {instead}")
    if mtp == "prune" and (problem := mtp_problem(layout)):
        raise InputError(f"--mtp prune: {problem}; use --mtp drop")


def strongest(checkpoint: Checkpoint, layer: MoeLayer, count: int, n_group: int) -> tuple[int, ...]:
    """The `count` experts whose router rows have the largest L2 norm, the same number in each of `n_group` groups.

    Norms are compared by their squares, summed exactly (math.fsum); the lowest id wins a tie.
    """
    routers = [tensor for tensor in layer.tensors if tensor.role == "router" and tensor.action == "slice"]
    instead = "use --mtp drop or --mtp keep"
    if not routers:
        raise InputError(f"{layer.prefix}: no router is known to rank its experts by; {instead}")
    energy = [0.0] * layer.num_experts
    for tensor in routers:
        rows = np.moveaxis(checkpoint.array(tensor.name).astype(np.float64), tensor.axis, 0)
        for expert in range(layer.num_experts):
            row = rows[expert * tensor.rows : (expert + 1) * tensor.rows]
            energy[expert] += math.fsum(np.square(row).ravel().tolist())
    for expert, value in enumerate(energy):
        if not math.isfinite(value):
            what = f"{layer.prefix}: expert {expert}: rows of the router are not finite, and rank no expert"
            raise InputError(f"{checkpoint.folder}: {what}; {instead}")
    size = layer.num_experts // n_group
    chosen: list[int] = []
    for group in range(n_group):
        members = sorted(range(group * size, (group + 1) * size), key=lambda e: (-energy[e], e))
        chosen += members[: count // n_group]
    return tuple(sorted(chosen))


def is_recoded(tensor: OutputTensor) -> bool:
    """Whether it is of a quantised expert that loses channels, whose bytes stand in no file of the source."""
    return isinstance(tensor.cut, Cut) and tensor.cut.narrow is not None and tensor.cut.narrow.coded


def output_tensor(entry: TensorEntry, cut: Cut | Widened | Constant | None) -> OutputTensor | None:
    """What becomes of a tensor of the source; None when its expert is dropped."""
    if cut is None:
        return OutputTensor(entry.name, entry.shape, entry, None)
    if isinstance(cut, Constant):
        return OutputTensor(cut.name, entry.shape[:1], entry, cut)
    if isinstance(cut, Widened):
        shape = (*entry.shape[: cut.axis], cut.size, *entry.shape[cut.axis + 1 :])
        return OutputTensor(entry.name, shape, entry, cut)
    if cut.tensor.action == "drop":
        new = cut.new_number()
        if new is None or cut.narrow is None:
            return None if new is None else OutputTensor(cut.tensor.renamed(new), entry.shape, entry, None)
        shape = narrow_shape(entry, cut.tensor, cut.narrow, entry.shape)
        return OutputTensor(cut.tensor.renamed(new), shape, entry, cut)
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
    if cut.narrow is not None:
        shape = narrow_shape(entry, cut.tensor, cut.narrow, shape)
    return OutputTensor(entry.name, shape, entry, cut)


def _row_bytes(entry: TensorEntry, cut: Cut) -> list[tuple[int, int]]:
    """Kept rows along the expert axis as (first byte, past the last) of one outer step, joined where they touch."""
    rows, row_bits = cut.tensor.rows, math.prod(entry.shape[cut.tensor.axis + 1 :]) * DTYPE_BITS[entry.dtype]
    spans = [(expert * rows, (expert + 1) * rows) for expert in cut.rank]
    if cut.tensor.trailing:
        spans.append((cut.num_experts * rows, cut.num_experts * rows + cut.tensor.trailing))
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return [(start * row_bits // 8, stop * row_bits // 8) for start, stop in joined]


def _inner_rows(entry: TensorEntry, cut: Cut, checkpoint: Checkpoint) -> bytes:
    outer = math.prod(entry.shape[: cut.tensor.axis])
    data = np.frombuffer(checkpoint.read(entry.name), np.uint8).reshape(outer, -1)
    return np.concatenate([data[:, a:b] for a, b in _row_bytes(entry, cut)], axis=1).tobytes()


def _remapped(entry: TensorEntry, cut: Cut, checkpoint: Checkpoint) -> bytes:
    return replace_experts(_table(entry, cut, checkpoint), tuple(cut.rank), cut.num_experts).tobytes()


def _table(entry: TensorEntry, cut: Cut, checkpoint: Checkpoint) -> np.ndarray:
    table = checkpoint.array(entry.name)
    if table.dtype.kind not in "iu" or (table.size and not (table.min() >= 0 and table.max() < cut.num_experts)):
        raise InputError(f"{entry.name}: expected expert numbers from 0 to {cut.num_experts - 1}")
    return table
