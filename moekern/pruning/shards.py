"""The files to write: a header each, and the byte ranges that follow it."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moekern.architectures import Layout, MoeLayer
from moekern.architectures.substitution import FORMS
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import DTYPE_BITS, TensorEntry
from moekern.checkpoint.strict_json import HEADER_CAP, shown
from moekern.errors import InputError
from moekern.plan.document import Mtp, Plan, planned_mtp
from moekern.pruning.constants import Constant, Replaced
from moekern.pruning.cuts import Cut, OutputTensor, is_recoded, output_tensor
from moekern.pruning.narrow import Narrow, Widened, widened
from moekern.pruning.pieces import Piece
from moekern.pruning.refitted import Refitted, check_fits

RECODED = (
    "is quantised, and loses channels by the plan: that cannot be copied; `moekern refit MODEL PLAN --data TEXT --out "
    "OUT` computes such experts anew"
)
NONE: Mapping[str, str] = {}
BLOCK = 4096  # file systems that share blocks between files share blocks of this size


@dataclass(frozen=True)
class OutputShard:
    """One file to write. Its tensors come from one file of the source, or from several when shards are made anew."""

    name: str
    metadata: dict[str, str]
    tensors: tuple[OutputTensor, ...]
    taken: int | None = None  # bytes of the header of the source's file of this name, where it stays as it is

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return self.header_bytes + self.data_bytes

    @property
    def header_bytes(self) -> int:
        return len(self.header()) if self.taken is None else self.taken

    @property
    def shared(self) -> int:
        """Bytes of whole blocks that lie in their block as in the file that they come from."""
        if self.taken is None:
            return best_phase(self.tensors)[1]
        return _blocks(self.tensors).get(self.taken % BLOCK, 0)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the source's files whose tensors these are."""
        return tuple(dict.fromkeys(tensor.entry.shard for tensor in self.tensors))

    @property
    def files(self) -> tuple[str, ...]:
        """The files that bytes come from: the source's, and those of refitted layers, by paths from its folder on."""
        own = () if self.taken is None else (self.name,)
        return tuple(dict.fromkeys((*own, *(tensor.file for tensor in self.tensors))))

    @property
    def computed(self) -> tuple[str, ...]:
        """Names of the tensors whose bytes stand in no file of the source."""
        return tuple(tensor.name for tensor in self.tensors if tensor.is_computed or tensor.new)

    @property
    def new(self) -> tuple[str, ...]:
        """Names of those of them that were computed before: by a refit, by training."""
        return tuple(tensor.name for tensor in self.tensors if tensor.new)

    def header(self) -> bytes:
        """Length and JSON, padded with spaces so that most of the data lies at the same place in its block as in the
        source, and can be shared; at the least to a multiple of 8 bytes. The source's metadata is kept."""
        content: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        for tensor, (start, stop) in zip(self.tensors, _offsets(self.tensors), strict=True):
            content[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [start, stop],
            }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        phase, _ = best_phase(self.tensors)
        padding = -len(text) % 8 if phase is None else (phase - 8 - len(text)) % BLOCK
        if len(text) + padding > HEADER_CAP:
            padding = -len(text) % 8
        text += b" " * padding
        return len(text).to_bytes(8, "little") + text

    def spans(self) -> list[tuple[int, int]]:
        """Where each tensor lies in the file."""
        start = self.size - self.data_bytes
        return [(start + a, start + b) for a, b in _offsets(self.tensors)]

    def pieces(self, checkpoint: Checkpoint) -> list[Piece]:
        """Header and data in file order. Ranges that touch in the source are joined; tensors that have to be computed
        are so when they are written, from what is read from `checkpoint` then."""
        own = (str(checkpoint.folder / self.name), 0, self.taken) if self.taken is not None else self.header()
        pieces: list[Piece] = [own]
        for run in _runs(self.tensors):
            if isinstance(run, OutputTensor):
                pieces += run.computed(checkpoint)
            else:
                pieces.append((str(checkpoint.folder / run.file), run.start, run.length))
        return pieces


def output_shards(
    checkpoint: Checkpoint,
    layout: Layout,
    kept: Mapping[str, Sequence[int]],
    mtp: Mtp,
    max_shard_size: int | None = None,
    refitted: Refitted | None = None,
    narrow: Mapping[str, Narrow] | None = None,
    replaced: Replaced | None = None,
    routers: Mapping[str, str] = NONE,
) -> tuple[OutputShard, ...]:
    """The files to write: one for each source file that keeps a tensor, in the source's order; with `max_shard_size`
    (bytes of data), as few as hold that much each, an expert's tensors together.

    `kept` maps layer keys to original ids; layers it does not name are copied whole. `narrow` says what stays of the
    channels of such layers, where some go. With `replaced` nothing is cut or renumbered: constants take the places of
    dropped experts, in the file that holds their down projection. Names stay when no file falls
    away and an index names them, else they are numbered anew. Tensors of `refitted` take the places of those of their
    names, which are of experts or, with their layers, among the `routers`. Raises InputError for a tensor whose shape
    does not hold its layer's experts, for a cut that would split a byte, and for a refitted tensor that fits no place.
    """
    cuts = _cuts(layout, kept, narrow, replaced)
    home: dict[str, tuple[str, int]] = {}  # layer and expert of a tensor that belongs to one
    computed = dict(routers)  # layer of a tensor that may be computed
    for key, layer in {**layout.layers, **layout.mtp}.items():
        home.update((tensor.name, (key, tensor.expert)) for tensor in layer.tensors if tensor.expert is not None)
        computed.update((tensor.name, key) for tensor in layer.of_role("expert"))
    dropped = layout.mtp_prefixes if mtp == "drop" else ()
    indexed = checkpoint.index is not None

    def made(entries: Iterable[TensorEntry]) -> Iterator[OutputTensor]:
        for entry in entries:
            if not (dropped and entry.name.startswith(dropped)):
                out = output_tensor(entry, cuts.get(entry.name))
                if out is not None:
                    new = refitted.tensors.get(out.name) if refitted else None
                    if new is None and is_recoded(out):
                        raise InputError(f"{checkpoint.folder}: {entry.name}: {RECODED}")
                    if new is not None:
                        check_fits(new, computed.get(entry.name), out.dtype, out.shape)
                    yield replace(out, new=new)

    if max_shard_size is not None:
        groups = _packed(made(e for shard in checkpoint.shards for e in shard.tensors), home, max_shard_size)
        packed = [OutputShard("", {}, _arranged(group)) for group in groups]
        _check_used(refitted, packed)
        return _numbered(
            [replace(shard, metadata=_merged_metadata(checkpoint, shard.sources)) for shard in packed], indexed
        )
    filled = [(shard, _arranged(list(made(shard.tensors)))) for shard in checkpoint.shards]
    shards = [OutputShard(shard.name, shard.metadata, tensors) for shard, tensors in filled if tensors]
    _check_used(refitted, shards)
    if len(shards) == len(checkpoint.shards) and (indexed or len(shards) == 1):
        return tuple(shards)
    return _numbered(shards, indexed)


def bytes_after(checkpoint: Checkpoint, layout: Layout, plan: Plan) -> int:
    """Bytes of the tensors that a plan leaves, from headers alone: which experts and channels stay changes no size."""
    mtp = planned_mtp(plan)
    counts = {key: len(plan.layers[key].keep) for key in layout.layers}
    narrow, replaced, left = dict[str, Narrow](), None, plan.width
    if plan.replace is not None:
        gone = {key: [*range(layout.layers[key].num_experts)][count:] for key, count in counts.items()}
        replaced = Replaced(FORMS[0], gone, None)
    elif mtp == "prune":
        counts |= {
            key: len(plan.layers[key].keep) if key in plan.layers else max(counts.values()) for key in layout.mtp
        }
    if left is not None:
        layers = {**layout.layers, **layout.mtp}
        narrow = {key: Narrow(layers[key].width or left, {}, left) for key in counts}
    cuts = _cuts(layout, {key: range(count) for key, count in counts.items()}, narrow, replaced)
    dropped = layout.mtp_prefixes if mtp == "drop" else ()
    found = (output_tensor(e, cuts.get(e.name)) for e in checkpoint.tensors.values() if not e.name.startswith(dropped))
    return sum(tensor.nbytes for tensor in found if tensor is not None)


def _cuts(
    layout: Layout,
    kept: Mapping[str, Sequence[int]],
    narrow: Mapping[str, Narrow] | None,
    replaced: Replaced | None,
) -> dict[str, Cut | Widened | Constant]:
    """Name -> what becomes of the tensors that do not stay as they are."""
    cuts: dict[str, Cut | Widened | Constant] = {}
    for key, layer in {**layout.layers, **layout.mtp}.items():
        if replaced is not None:
            cuts |= _replaced_cuts(layout, key, layer, replaced)
        elif key in kept:
            rank = {old: new for new, old in enumerate(sorted(kept[key]))}
            own = (narrow or {}).get(key)
            for tensor in layer.tensors:
                of = None if tensor.channel_axis is None else own
                cuts[tensor.name] = Cut(tensor, rank, layer.num_experts, of)
            cuts |= widened(layout, layer, own.left) if own else {}
    return cuts


def _replaced_cuts(layout: Layout, key: str, layer: MoeLayer, replaced: Replaced) -> dict[str, Cut | Constant]:
    """Name -> what becomes of the tensors of a layer's replaced experts."""
    gone = set(replaced.dropped.get(key, ()))
    return {
        tensor.name: replaced.constant(layout, key, tensor.expert)
        if tensor.projection == "down" and not tensor.is_bias
        else Cut(tensor, {}, layer.num_experts)
        for tensor in layer.of_role("expert")
        if tensor.expert is not None and tensor.expert in gone
    }


def _check_used(refitted: Refitted | None, shards: Sequence[OutputShard]) -> None:
    """Raise InputError for a refitted tensor that the output has no place for."""
    used = {name for shard in shards for name in shard.new}
    for name, tensor in refitted.tensors.items() if refitted else ():
        if name not in used:
            raise InputError(f"{tensor.path}: tensor {shown(name)}: the pruned model has no tensor of this name")


def _merged_metadata(checkpoint: Checkpoint, sources: Collection[str]) -> dict[str, str]:
    return {k: v for shard in checkpoint.shards if shard.name in sources for k, v in shard.metadata.items()}


def _numbered(shards: Sequence[OutputShard], indexed: bool) -> tuple[OutputShard, ...]:
    if len(shards) == 1 and not indexed:
        return (replace(shards[0], name="model.safetensors"),)
    total = len(shards)
    return tuple(replace(shard, name=f"model-{n:05d}-of-{total:05d}.safetensors") for n, shard in enumerate(shards, 1))


def _packed(
    tensors: Iterable[OutputTensor], home: Mapping[str, tuple[str, int]], limit: int
) -> list[list[OutputTensor]]:
    """Tensors in their order in groups of at most `limit` bytes, those of one expert in one group."""
    units: dict[object, list[OutputTensor]] = {}
    for tensor in tensors:
        units.setdefault(home.get(tensor.entry.name, tensor.entry.name), []).append(tensor)
    groups: list[list[OutputTensor]] = []
    room = 0
    for unit in units.values():
        size = sum(tensor.nbytes for tensor in unit)
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1] += unit
        room -= size
    return groups


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes that follow one another in a file and in the output's data."""

    file: str
    start: int
    offset: int  # in the output's data
    length: int

    @property
    def phase(self) -> int:
        """What the data must start at, modulo the block, for source and output to lie alike."""
        return (self.start - self.offset) % BLOCK

    @property
    def blocks(self) -> int:
        """Bytes of the whole blocks of the source in it."""
        return max(0, self.length - -self.start % BLOCK) // BLOCK * BLOCK


def _runs(tensors: Iterable[OutputTensor]) -> Iterator["_Run | OutputTensor"]:
    """The data in order: the longest runs, and the tensors that have to be computed."""
    run: _Run | None = None
    offset = 0
    for tensor in tensors:
        ranges = tensor.ranges()
        if ranges is None:
            if run is not None:
                yield run
            run = None
            yield tensor
            offset += tensor.nbytes
            continue
        for start, stop in ranges:
            if run is not None and run.file == tensor.file and run.start + run.length == start:
                run = replace(run, length=run.length + stop - start)
            else:
                if run is not None:
                    yield run
                run = _Run(tensor.file, start, offset, stop - start)
            offset += stop - start
    if run is not None:
        yield run


def best_phase(tensors: Iterable[OutputTensor]) -> tuple[int | None, int]:
    """Where the data must start, modulo the block, for the most bytes to lie in their block as in the source; and how
    many bytes of whole blocks these are. None when there are none. A multiple of 8, so that alignment is kept."""
    blocks = {phase: nbytes for phase, nbytes in _blocks(tensors).items() if phase % 8 == 0}
    if not blocks:
        return None, 0
    phase = min(blocks, key=lambda p: (-blocks[p], p))
    return phase, blocks[phase]


def _blocks(tensors: Iterable[OutputTensor]) -> dict[int, int]:
    """Where the data may start, modulo the block -> bytes of whole blocks that then lie as in the source."""
    blocks: dict[int, int] = {}
    for run in _runs(tensors):
        if isinstance(run, _Run) and run.blocks:
            blocks[run.phase] = blocks.get(run.phase, 0) + run.blocks
    return blocks


def _arranged(tensors: list[OutputTensor]) -> tuple[OutputTensor, ...]:
    """The source's order where it leaves every tensor on its natural alignment (readers that map the file need that,
    and the format allows no gaps), else wide elements first; or, where more blocks can be shared that way, the
    tensors of whole blocks first and the odd ones last."""
    kept = _aligned(tensors)
    odd_last = [tensor for tensor in tensors if tensor.nbytes % BLOCK == 0]
    odd_last += sorted((tensor for tensor in tensors if tensor.nbytes % BLOCK), key=_item_bytes, reverse=True)
    return tuple(odd_last if best_phase(odd_last)[1] > best_phase(kept)[1] else kept)


def _aligned(tensors: list[OutputTensor]) -> list[OutputTensor]:
    for tensor, (start, _) in zip(tensors, _offsets(tensors), strict=True):
        if start % _item_bytes(tensor):
            return sorted(tensors, key=_item_bytes, reverse=True)
    return tensors


def _offsets(tensors: Iterable[OutputTensor]) -> Iterator[tuple[int, int]]:
    stop = 0
    for tensor in tensors:
        start, stop = stop, stop + tensor.nbytes
        yield start, stop


def _item_bytes(tensor: OutputTensor) -> int:
    return max(1, DTYPE_BITS[tensor.dtype] // 8)
