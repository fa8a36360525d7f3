"""One expert of a checkpoint as numbers, and merged ones as the tensors that the pruned checkpoint holds of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekern.architectures import ExpertTensor, MoeLayer
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import TensorEntry
from moekern.errors import InputError
from moekern.model.merged_experts import Parts, combined_rows, merged_expert, shares
from moekern.model.reader import DTYPES
from moekern.model.states import bytes_of
from moekern.plan.document import LayerPlan
from moekern.plan.router_rows import Rows
from moekern.pruning.narrow import expert_axis, expert_matrix, expert_place

Stored = dict[str, tuple[str, Sequence[int], Any]]  # name -> safetensors dtype, shape, bytes


def merged_layer(checkpoint: Checkpoint, layer: MoeLayer, plan: LayerPlan, *, align: bool) -> Stored:
    """The tensors of experts that merging changes, as the pruned checkpoint holds them: of experts with tensors of
    their own those that others are merged into, stacks of all. Members are read one at a time. Raises InputError for
    weights that are not finite."""
    of = _Experts(checkpoint, layer)
    found: Stored = {}
    stacks: dict[str, Tensor] = {}
    for rank, (expert, group) in enumerate(zip(plan.keep, plan.groups or (), strict=True)):
        others = shares(expert, group)
        made = None
        if others:
            made = merged_expert(of.parts(expert), ((of.parts(e), share) for e, share in others), align=align)
            if not all(bool(value.isfinite().all()) for value in made.values()):
                what = f"layer {layer.key}: expert {expert}: weights of its group are not finite, and are not merged"
                raise InputError(f"{checkpoint.folder}: {what}")
        for tensor, entry in of.tensors(expert):
            if tensor.expert is None:
                value = of.piece(tensor, entry, expert) if made is None else _joined(made, tensor)
                shape = (len(plan.keep), *expert_matrix(tensor, entry))
                stack = stacks.setdefault(tensor.name, torch.empty(shape, dtype=DTYPES[entry.dtype]))
                stack[rank].copy_(value)
            elif made is not None:
                value = _joined(made, tensor).to(DTYPES[entry.dtype]).contiguous()
                found[tensor.renamed(rank)] = (entry.dtype, tuple(value.shape), bytes_of(value))
    for tensor in layer.of_role("expert"):
        if tensor.name in stacks:
            stack = stacks[tensor.name].flatten(0, 1) if tensor.rows > 1 else stacks[tensor.name]
            found[tensor.name] = (checkpoint.tensors[tensor.name].dtype, tuple(stack.shape), bytes_of(stack))
    return found


def routed_layer(checkpoint: Checkpoint, tensors: Iterable[ExpertTensor], plan: LayerPlan, rows: Rows) -> Stored:
    """Matrix and bias of a layer's router with the experts of the plan, some of which have the combined `rows`, and
    what trails behind the last expert's. Raises InputError for numbers that are not finite."""
    found: Stored = {}
    for tensor in tensors:
        entry = checkpoint.tensors[tensor.name]
        data = checkpoint.read_data(checkpoint.folder / entry.shard, entry, entry.start, entry.nbytes)
        whole = torch.frombuffer(bytearray(data), dtype=DTYPES[entry.dtype]).reshape(entry.shape)
        left = [*plan.keep, *range(len(whole) - tensor.trailing, len(whole))]
        made = combined_rows(whole, whole[left], plan.keep, rows)
        if not bool(made.isfinite().all()):
            what = "rows that its merged experts get are not finite; take --router dominant"
            raise InputError(f"{checkpoint.folder}: {tensor.name}: {what}")
        found[tensor.name] = (entry.dtype, tuple(made.shape), bytes_of(made))
    return found


@dataclass(frozen=True)
class _Experts:
    """The experts of a layer, read one at a time."""

    checkpoint: Checkpoint
    layer: MoeLayer

    def tensors(self, expert: int) -> Iterator[tuple[ExpertTensor, TensorEntry]]:
        """Those that hold numbers of the expert."""
        for tensor in self.layer.of_role("expert"):
            if tensor.expert in (None, expert):
                yield tensor, self.checkpoint.tensors[tensor.name]

    def piece(self, tensor: ExpertTensor, entry: TensorEntry, expert: int) -> Tensor:
        """What a tensor holds of the expert."""
        start, size = expert_place(tensor, entry, expert)
        data = self.checkpoint.read_data(self.checkpoint.folder / entry.shard, entry, start, size)
        return torch.frombuffer(bytearray(data), dtype=DTYPES[entry.dtype]).reshape(expert_matrix(tensor, entry))

    def parts(self, expert: int) -> dict[str, Tensor]:
        """The expert by fields of `projections.Views`."""
        found: dict[str, Tensor] = {}
        for tensor, entry in self.tensors(expert):
            value, bias = self.piece(tensor, entry, expert), "_bias" if tensor.is_bias else ""
            if value.ndim == 2 and expert_axis(tensor) != (tensor.projection == "down"):
                value = value.mT
            names = [f"{name}{bias}" for name in tensor.projection.split("_")]
            alternating = tensor.channel_form == "alternating"
            pieces = [value[i::2] for i in range(2)] if alternating else value.chunk(len(names))
            found |= dict(zip(names, pieces, strict=True))
        return found


def _joined(parts: Parts, tensor: ExpertTensor) -> Tensor:
    """The inverse of what `_Experts.parts` does to one tensor."""
    bias = "_bias" if tensor.is_bias else ""
    pieces = [parts[f"{name}{bias}"] for name in tensor.projection.split("_")]
    alternating = tensor.channel_form == "alternating"
    value = torch.stack(pieces, 1).flatten(0, 1) if alternating else torch.cat(pieces)
    return value.mT if value.ndim == 2 and expert_axis(tensor) != (tensor.projection == "down") else value
