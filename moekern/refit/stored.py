"""The experts of a layer in memory as the tensors that the pruned checkpoint holds of them, and the numbers that these
can hold: what is computed is rounded to them, in the source's own format where it is quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import moekern._C as _C
from moekern.architectures import ExpertTensor, Layout, MoeLayer
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import TensorEntry
from moekern.errors import InputError
from moekern.model.dequantised import CODES, FLOATS, dense
from moekern.model.projections import Views, views
from moekern.model.reader import DTYPES, read_experts
from moekern.model.requantised import as_stored, check_written, requantised, weights_of
from moekern.model.states import bytes_of
from moekern.model.transformers_api import Loader
from moekern.plan.formats import ComputedFormat, computed_format, weight_format

Stored = dict[str, tuple[str, Sequence[int], Any]]  # name -> safetensors dtype, shape, bytes
Form = tuple[bool, bool]  # channels of gate and up alternate; the matrix is stored turned
Name = tuple[str, bool]  # the projection, and whether it is its bias
FORMS = ((False, False), (False, True), (True, False), (True, True))
TWIN = "refit an unquantised twin of the model, and quantise the result"


def format_of(asked: str, checkpoint: Checkpoint, layout: Layout) -> ComputedFormat:
    """In which format computed experts are written. Raises InputError where they cannot be."""
    names = [t.name for layer in layout.layers.values() for t in layer.of_role("expert")]
    return computed_format(asked, weight_format(checkpoint.config, names))


def stored_bytes(checkpoint: Checkpoint, layout: Layout) -> int:
    """Bytes that `StoredExperts` holds of a layer at most."""
    layers = [layer for layer in layout.layers.values() if not layer.plain]
    sizes = [sum(checkpoint.tensors[t.name].nbytes for t in layer.of_role("expert")) for layer in layers]
    return max(sizes, default=0)


def check_formats(
    checkpoint: Checkpoint, layout: Layout, loader: Loader, keys: Iterable[str], all_parts: Callable[[MoeLayer], bool]
) -> None:
    """Read an expert of each layer whose experts are not plain matrices. Raises InputError, naming a tensor, where
    computed ones cannot be written as it is."""
    for key in keys:
        layer = layout.layers[key]
        if not layer.plain:
            for found in _read(checkpoint, loader, layer, [0], all_parts=all_parts(layer)).values():
                try:
                    check_written(found.likes[0], loader.quantisation)
                except ValueError as error:
                    name = next(iter(found.tensors[0].values())).name
                    raise InputError(f"{checkpoint.folder}: {name}: {error}; {TWIN}") from None


@dataclass
class _Known:
    """Numbers of a weight that a checkpoint can hold: all its parts but the codes (None: those of the source), and the
    error with which they stand for what was computed, as `Requantised` has it."""

    scales: Mapping[str, Tensor] | None = None
    error_square: float = 0.0
    square: float = 0.0


@dataclass
class _Weight:
    """A projection, or its bias, of n experts as the source stores it."""

    tensors: list[dict[str, ExpertTensor]] = field(default_factory=list)  # of each expert: part -> tensor
    likes: list[dict[str, Tensor]] = field(default_factory=list)  # part -> what it is in the source
    form: Form = FORMS[0]
    dtype: torch.dtype = torch.float32  # that they are computed in
    known: list[dict[bytes, _Known]] = field(default_factory=list)  # of each expert, by the digest of the numbers
    now: list[bytes] = field(default_factory=list)


class StoredExperts:
    """How the source stores what is computed of the experts `keep` of a layer, which `block` holds in the order of
    their numbers: their down projections, or with `all_parts` all that they are.

    channels: int64 [n, M], those that each expert has left, None: all. Quantised experts that lose some become what
    their format holds of these at once, all parts of them. dtype: that of safetensors which plain ones become, None:
    the source's. Memory: what the source stores of them, where that is quantised. Raises InputError where it is stored
    in a way that is not known.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        loader: Loader,
        layer: MoeLayer,
        keep: Sequence[int],
        block: nn.Module,
        channels: Tensor | None = None,
        *,
        all_parts: bool,
        dtype: str | None = None,
    ) -> None:
        self.layer, self.entries, self.dtype, self.config = layer, checkpoint.tensors, dtype, loader.quantisation
        self.order, self.chosen = sorted(keep), layer.refitted(all_parts=all_parts)
        self.plain = {  # projection or bias of plain experts -> its type
            (part, t.is_bias): DTYPES[dtype or self.entries[t.name].dtype]
            for t in (self.chosen if layer.plain else ())
            for part in t.projection.split("_")
        }
        self.weights: dict[Name, _Weight] = {}
        if not layer.plain:
            self.weights = _read(checkpoint, loader, layer, self.order, all_parts=all_parts)
        of = views(block)
        narrow = channels is not None and channels.shape[1] != layer.width
        for name, weight in self.weights.items():
            pieces = _pieces(of, name)
            left = _Left(layer.width, channels[0]) if narrow and channels is not None and layer.width else None
            form = _form([piece[0] for piece in pieces], weight.likes[0], self.config, name, left)
            if form is None:
                what = "its experts are computed with other numbers than those that are stored"
                raise InputError(f"{checkpoint.folder}: {weight.tensors[0].popitem()[1].name}: {what}; {TWIN}")
            weight.form, weight.dtype = form, pieces[0].dtype
            for expert in range(len(self.order)):
                own = [piece[expert] for piece in pieces]
                known = self._narrowed(weight, expert, own) if narrow else _Known()
                weight.now.append(_digest(_joined(own, form).float()))
                weight.known.append({weight.now[-1]: known})

    def down(self, expert: int, weight: Tensor) -> Tensor:
        """The nearest to float32 [H, I] that the checkpoint can hold; of what it has given before, the same. Numbers
        that the format cannot hold are NaN."""
        if self.weights:
            return self._settled(("down", False), expert, [weight])[0]
        return weight.to(self.plain["down", False]).to(weight)

    def all(self, expert: int, of: Views) -> None:
        """The same of all that an expert is, in place: `of` it alone, float32 [1, ...]."""
        for name, dtype in self.plain.items():
            for piece in _pieces(of, name):
                piece.copy_(piece.to(dtype))
        for name in self.weights:
            pieces = [piece[0] for piece in _pieces(of, name)]
            for piece, value in zip(pieces, self._settled(name, expert, pieces), strict=True):
                piece.copy_(value)

    def error(self) -> float | None:
        """Of what is quantised again, the root of the summed squares of what its numbers differ by from what was
        computed, over those of what was computed. None where plain numbers are stored."""
        if not any(len(like) > 1 for weight in self.weights.values() for like in weight.likes):
            return None
        found = [w.known[e][now] for w in self.weights.values() for e, now in enumerate(w.now)]
        whole = sum(each.square for each in found)
        return (sum(each.error_square for each in found) / whole) ** 0.5 if whole else 0.0

    def tensors(self, block: nn.Module) -> Stored:
        """Name in the pruned checkpoint -> dtype, shape and bytes of what the experts have become."""
        of, found = views(block), Stored()
        if not self.weights:
            for tensor in self.chosen:
                found |= self._plain(of, tensor)
            return found
        for name, weight in self.weights.items():
            stacks: dict[str, list[Tensor]] = {}
            for expert, parts in enumerate(self._parts_of(of, name, weight)):
                for part, value in parts.items():
                    tensor = weight.tensors[expert][part]
                    if tensor.expert is None:
                        stacks.setdefault(tensor.name, []).append(value)
                    else:
                        found[tensor.renamed(expert)] = as_stored(value)
            found |= {stack: as_stored(torch.stack(values)) for stack, values in stacks.items()}
        return found

    def _parts_of(self, of: Views, name: Name, weight: _Weight) -> Iterable[Mapping[str, Tensor]]:
        """What each expert is stored as."""
        pieces = _pieces(of, name)
        for expert, like in enumerate(weight.likes):
            known = weight.known[expert][weight.now[expert]]
            if known.scales is None:
                yield like
                continue
            whole = _joined([piece[expert] for piece in pieces], weight.form).float().cpu()
            yield requantised(whole, {**like, **known.scales}, self.config, anew=False).parts

    def _narrowed(self, weight: _Weight, expert: int, pieces: list[Tensor]) -> _Known:
        """Let `pieces`, in place, be what the format holds of them, and what they are `like` that, which is no larger
        than they are."""
        whole = _joined(pieces, weight.form).float().contiguous()
        like = {part: value.to(whole.device) for part, value in weight.likes[expert].items()}
        try:
            found = requantised(whole, like, self.config)
        except ValueError as error:
            name = next(iter(weight.tensors[expert].values())).name
            raise InputError(f"{name}: with {self.layer.width} channels and fewer: {error}; {TWIN}") from None
        weight.likes[expert] = {part: value.cpu() for part, value in found.parts.items()}
        stored = dense(found.parts, self.config, weight.dtype)
        with torch.no_grad():
            for piece, value in zip(pieces, _parted(stored, len(pieces), weight.form), strict=True):
                piece.copy_(value)
        return _Known(None, found.error_square, found.square)

    def _settled(self, name: Name, expert: int, pieces: list[Tensor]) -> list[Tensor]:
        weight = self.weights[name]
        whole = _joined(pieces, weight.form).float().contiguous()
        digest, known = _digest(whole), weight.known[expert]
        if digest not in known:
            like = {part: value.to(whole.device) for part, value in weight.likes[expert].items()}
            try:
                found = requantised(whole, like, self.config)
            except ValueError:
                return [torch.full_like(piece, torch.nan) for piece in pieces]
            whole = dense(found.parts, self.config, weight.dtype).float()
            digest = _digest(whole)
            scales = {part: value.cpu() for part, value in found.parts.items() if part not in CODES}
            known.setdefault(digest, _Known(scales, found.error_square, found.square))
        weight.now[expert] = digest
        return _parted(whole, len(pieces), weight.form)

    def _plain(self, of: Views, tensor: ExpertTensor) -> Stored:
        """A tensor of plain experts."""
        entry = self.entries[tensor.name]
        rank = {old: new for new, old in enumerate(self.order)}
        if tensor.expert is None:
            name, value = tensor.name, _whole(of, tensor, entry)
        elif tensor.expert in rank:
            name, value = tensor.renamed(rank[tensor.expert]), _whole(of, tensor, entry)[rank[tensor.expert]]
        else:
            return {}
        value = value.flatten(0, 1) if tensor.rows > 1 else value
        dtype = self.dtype or entry.dtype
        value = value.to("cpu", DTYPES[dtype]).contiguous()
        return {name: (dtype, tuple(value.shape), bytes_of(value))}


def _read(
    checkpoint: Checkpoint, loader: Loader, layer: MoeLayer, experts: Sequence[int], *, all_parts: bool
) -> dict[Name, _Weight]:
    """What is computed of these experts as the source stores it. Raises InputError for what the model has no place
    for."""
    chosen = {t.name: t for t in layer.refitted(all_parts=all_parts) if t.expert is None or t.expert in experts}
    if any(tensor.rows > 1 for tensor in chosen.values()):
        raise InputError(f"{checkpoint.folder}: {layer.prefix}: experts that are rows of one matrix are not refitted")
    stored = read_experts(checkpoint, replace(layer, tensors=tuple(chosen.values())), experts)
    found: dict[Name, _Weight] = {}
    for names in weights_of(loader, chosen).values():
        first = chosen[next(iter(names.values()))]
        weight = found.setdefault((first.projection, first.is_bias), _Weight())
        if not weight.tensors:
            weight.tensors, weight.likes = [{} for _ in experts], [{} for _ in experts]
        for rank, expert in enumerate(experts):
            if first.expert in (None, expert):
                weight.tensors[rank] = {part: chosen[name] for part, name in names.items()}
                weight.likes[rank] = {
                    part: stored[name][rank] if first.expert is None else stored[name] for part, name in names.items()
                }
    for weight in found.values():
        if not all(weight.likes):
            raise InputError(f"{checkpoint.folder}: {layer.prefix}: the model has no place for some of its experts")
    if ("down", False) not in found:
        raise InputError(f"{checkpoint.folder}: {layer.prefix}: none of its tensors is known as a down projection")
    return found


def _pieces(of: Views, name: Name) -> list[Tensor]:
    """Views of a projection, of gate and up two: [E, I, H], of down [E, H, I], of biases [E, ...]."""
    projection, bias = name
    gate, up, down = (of.gate_bias, of.up_bias, of.down_bias) if bias else (of.gate, of.up, of.down)
    parts = {"gate": [gate], "up": [up], "gate_up": [gate, up], "down": [down]}[projection]
    return [part for part in parts if part is not None]


@dataclass(frozen=True)
class _Left:
    """The channels that an expert has left, int64 [M], of so many."""

    width: int
    channels: Tensor

    def of(self, piece: Tensor, name: Name) -> Tensor | None:
        """What is left of a projection or a bias, as `Views` have it; None where it has not so many channels."""
        projection, bias = name
        axis = None if projection == "down" and bias else int(projection == "down")
        if axis is None:
            return piece
        fits = piece.ndim > axis and piece.shape[axis] == self.width
        return piece.index_select(axis, self.channels.to(piece.device)) if fits else None


def _form(
    pieces: Sequence[Tensor], like: Mapping[str, Tensor], config: Mapping[str, Any], name: Name, left: _Left | None
) -> Form | None:
    """How an expert's numbers, as they are computed with, lie in what is stored; None where these are others."""
    if not pieces or pieces[0].dtype not in FLOATS:
        return None
    stored = dense(like, config, pieces[0].dtype).to(pieces[0])
    for form in FORMS:
        parts = list(_parted(stored, len(pieces), form))
        found = parts if left is None else [left.of(part, name) for part in parts]
        same = (b is not None and torch.equal(a, b) for a, b in zip(pieces, found, strict=False))
        if len(found) == len(pieces) and all(same):
            return form
    return None


def _joined(pieces: Sequence[Tensor], form: Form) -> Tensor:
    """A projection of one expert as it is stored."""
    alternate, turned = form
    whole = torch.stack(tuple(pieces), 1).flatten(0, 1) if alternate else torch.cat(tuple(pieces))
    return whole.mT if turned and whole.ndim == 2 else whole


def _parted(whole: Tensor, count: int, form: Form) -> list[Tensor]:
    """The inverse."""
    alternate, turned = form
    whole = whole.mT if turned and whole.ndim == 2 else whole
    return [whole[i::count] for i in range(count)] if alternate else list(whole.chunk(count))


def _digest(numbers: Tensor) -> bytes:
    state = _C.Xxh3()
    state.update(bytes_of(numbers.cpu().contiguous()))
    return bytes(state.digest())


def _whole(of: Views, tensor: ExpertTensor, entry: TensorEntry) -> Tensor:
    """All experts' part [n, ...] of plain ones, each as it is stored."""
    stacked = tensor.expert is None and tensor.rows == 1
    matrix = len(entry.shape) - stacked == 2
    pieces = _pieces(of, (tensor.projection, not matrix))
    if tensor.channel_axis is None:
        return pieces[0]
    if tensor.projection == "down":
        pieces = [pieces[0].transpose(1, 2)]  # channels on axis 1
    assert len(pieces) == (2 if tensor.projection == "gate_up" else 1)
    alternate = tensor.channel_form == "alternating"
    whole = torch.stack(pieces, 2).flatten(1, 2) if alternate else torch.cat(pieces, 1)
    return whole.transpose(1, 2) if matrix and tensor.channel_axis - stacked == 1 else whole
