"""An expert's matrices as numbers, from the tensors a checkpoint stores: dense, or quantised in one of many layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moekern.architectures import ExpertTensor, MoeLayer
from moekern.architectures.quantisation import quantisation_of
from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError
from moekern.kernels import Quantised, dequantize
from moekern.model.dequantised import PART, WEIGHT, matrix_of
from moekern.model.reader import read_experts

Matrix = Tensor | Quantised


def projections(checkpoint: Checkpoint, layer: MoeLayer) -> dict[str, list[Matrix]]:
    """Each stored projection of a layer (gate, up, down, or gate and up in one) as [R, C] matrices, one an expert.

    The layer is read whole and held as it is stored. Raises InputError, naming a tensor, for a layout that moekern does
    not know as numbers.
    """
    stored = read_experts(checkpoint, layer, range(layer.num_experts))
    parts: dict[str, list[dict[str, Tensor]]] = {}
    for tensor in layer.of_role("expert"):
        if tensor.expert is not None and tensor.expert >= layer.num_experts:
            continue
        name = tensor.template or tensor.name
        if name.endswith((".bias", "_bias")):
            continue
        found = PART.fullmatch(name)
        projection, part = (found["module"], found["part"]) if found else (name, WEIGHT)
        experts = parts.setdefault(projection, [{} for _ in range(layer.num_experts)])
        for e, value in _of_experts(tensor, stored[tensor.name], layer.num_experts):
            experts[e][part] = value
    config = quantisation_of(checkpoint.config)
    whole: dict[str, list[Matrix]] = {}
    for projection, experts in parts.items():
        try:
            whole[projection] = [_matrix(found, config) for found in experts]
        except ValueError as error:
            raise InputError(f"{checkpoint.folder}: {projection}: {error}") from error
    return whole


def parted(matrix: Matrix, axis: int, alternating: bool) -> tuple[Tensor, Tensor]:
    """Gate and up of a projection that holds both along `axis`, rows [I, H]; quantised ones in float32."""
    dense = dequantize(matrix, torch.float32) if isinstance(matrix, Quantised) else matrix
    rows = dense.movedim(axis, 0)
    gate, up = (rows[::2], rows[1::2]) if alternating else rows.chunk(2)
    return gate.contiguous(), up.contiguous()


def _of_experts(tensor: ExpertTensor, value: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    if tensor.expert is not None:
        yield tensor.expert, value
        return
    rows = value.movedim(tensor.axis, 0).unflatten(0, (num_experts, tensor.rows))
    for e in range(num_experts):
        part = rows[e]
        yield e, (part[0] if tensor.rows == 1 else part).contiguous()


def _matrix(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Matrix:
    matrix = matrix_of(parts, config)
    if len(matrix.shape) != 2:
        raise ValueError(f"an expert's weight of shape {list(matrix.shape)} is not a layout that moekern reads")
    return matrix
