"""The experts of a layer in memory as the tensors that the pruned checkpoint holds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekern.architectures import ExpertTensor, MoeLayer
from moekern.checkpoint.header import TensorEntry
from moekern.errors import InputError
from moekern.model.projections import Views, views
from moekern.model.reader import DTYPES
from moekern.model.states import bytes_of

Stored = dict[str, tuple[str, Sequence[int], Any]]  # name -> safetensors dtype, shape, bytes


def stored_dtype(layer: MoeLayer, entries: Mapping[str, TensorEntry]) -> torch.dtype:
    """The type that a layer's experts are stored in. Raises InputError for experts that are not stored as matrices of
    gate, up and down: what would be computed could not be written."""
    if layer.width is None:
        what = "its experts are not stored as plain matrices of gate, up and down (quantised ones are not refitted)"
        raise InputError(f"layer {layer.key}: {what}; take a twin of the model in bfloat16")
    return next(DTYPES[entries[t.name].dtype] for t in layer.of_role("expert") if t.projection == "down")


def stored_experts(
    block: nn.Module, layer: MoeLayer, keep: Sequence[int], entries: Mapping[str, TensorEntry], *, all_parts: bool
) -> Stored:
    """Name in the pruned checkpoint -> dtype (the source's), shape and bytes of what the experts `keep` have become,
    which `block` holds in the order of their numbers: of their down projections, or with `all_parts` of all they are.
    """
    of, found = views(block), Stored()
    rank = {old: new for new, old in enumerate(sorted(keep))}
    for tensor in layer.of_role("expert"):
        entry = entries[tensor.name]
        matrix, channels = _is_matrix(tensor, entry), tensor.channel_axis is not None
        down, bias = tensor.projection == "down", not matrix and bool(tensor.projection)
        if not (down and channels) and not (all_parts and (channels or bias)):  # JetMoE's attention has experts too
            continue
        if tensor.expert is None:
            name, value = tensor.name, _whole(of, tensor, entry)
        elif tensor.expert in rank:
            name, value = tensor.renamed(rank[tensor.expert]), _whole(of, tensor, entry)[rank[tensor.expert]]
        else:
            continue
        value = value.flatten(0, 1) if tensor.rows > 1 else value
        value = value.to("cpu", DTYPES[entry.dtype]).contiguous()
        found[name] = entry.dtype, tuple(value.shape), bytes_of(value)
    return found


def _whole(of: Views, tensor: ExpertTensor, entry: TensorEntry) -> Tensor:
    """All experts' part [n, ...], each as it is stored."""
    stacked, matrix = _stacked(tensor), _is_matrix(tensor, entry)
    if tensor.channel_axis is None:
        assert of.down_bias is not None
        return of.down_bias
    gate, up = (of.gate, of.up) if matrix else (of.gate_bias, of.up_bias)
    parts: dict[str, list[Tensor | None]] = {
        "gate": [gate], "up": [up], "gate_up": [gate, up], "down": [of.down.transpose(1, 2)],
    }  # fmt: skip
    wanted = parts[tensor.projection]
    known = [part for part in wanted if part is not None]  # channels on axis 1
    assert len(known) == len(wanted)
    alternate = tensor.channel_form == "alternating"
    whole = torch.stack(known, 2).flatten(1, 2) if alternate else torch.cat(known, 1)
    return whole.transpose(1, 2) if matrix and tensor.channel_axis - stacked == 1 else whole


def _stacked(tensor: ExpertTensor) -> bool:
    """Whether experts have an axis of their own."""
    return tensor.expert is None and tensor.rows == 1


def _is_matrix(tensor: ExpertTensor, entry: TensorEntry) -> bool:
    """Whether an expert's part has two axes."""
    return len(entry.shape) - _stacked(tensor) == 2
