"""An expert's matrices as numbers, from the tensors a checkpoint stores: dense, or quantised in one of many layouts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moekern.architectures import ExpertTensor, MoeLayer
from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError
from moekern.kernels import Quantised, dequantize
from moekern.kernels.quantised import awq, block_of, block_sizes, gptq, mxfp4, nvfp4, pack_quantized, scaled
from moekern.model.reader import read_experts

Matrix = Tensor | Quantised
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PART = re.compile(
    r"(?P<projection>.*?)[._](?P<part>weight_packed|weight_scale_inv|weight_scale_2|weight_scale|weight_global_scale|"
    r"weight_zero_point|weight_shape|weight_g_idx|weight|scale_inv|scales|scale|blocks|packed|qweight|qzeros|g_idx|"
    r"input_scale|input_global_scale|bias)"
)
SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale")
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")


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
        found = PART.fullmatch(name)
        projection, part = (found["projection"], found["part"]) if found else (name, "weight")
        experts = parts.setdefault(projection, [{} for _ in range(layer.num_experts)])
        for e, value in _of_experts(tensor, stored[tensor.name], layer.num_experts):
            experts[e][part] = value
    config = _quantisation(checkpoint.config)
    whole: dict[str, list[Matrix]] = {}
    for projection, experts in parts.items():
        if set(experts[0]) <= {"bias"}:
            continue
        try:
            matrices = [_matrix(found, config) for found in experts]
        except ValueError as error:
            raise InputError(f"{checkpoint.folder}: {projection}: {error}") from error
        known = [matrix for matrix in matrices if matrix is not None]
        if len(known) < len(matrices):
            what = ", ".join(f"{part} {str(t.dtype).removeprefix('torch.')}" for part, t in sorted(experts[0].items()))
            raise InputError(f"{checkpoint.folder}: {projection}: {what} are not a weight layout that moekern reads")
        whole[projection] = known
    return whole


def fused_axis(shape: Sequence[int], others: Sequence[Sequence[int]]) -> int | None:
    """The axis along which a projection of `shape` holds gate and up, as the one other, down, tells; None if it does
    not: [2I, H] beside [H, I], or [H, 2I] beside [I, H]."""
    if len(others) != 1:
        return None
    (a, b), (c, d) = shape, others[0]
    return 0 if (a, b) == (2 * d, c) else 1 if (a, b) == (d, 2 * c) else None


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


def _quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for place in (config, config.get("text_config")):
        for key in QUANTIZATION_KEYS:
            if isinstance(place, dict) and isinstance(place.get(key), dict):
                found: Mapping[str, Any] = place[key]
                return found
    return {}


def _matrix(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Matrix | None:
    """One expert's projection; None for a layout that is not known."""
    if "qweight" in parts:
        return _int4(parts, config)
    if "blocks" in parts and "scales" in parts:
        return mxfp4(parts["blocks"], parts["scales"])
    scale = next((parts[name] for name in SCALES if name in parts), None)
    packed = parts.get("weight_packed", parts.get("packed"))
    if packed is not None:
        return None if scale is None else _packed(packed, scale, parts)
    weight = parts.get("weight")
    if weight is None or weight.ndim != 2:
        return None
    if weight.dtype in FLOATS:
        return weight
    if weight.dtype == torch.uint8 and scale is not None and "weight_scale_2" in parts:
        return nvfp4(weight, scale, parts["weight_scale_2"])
    if weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8) and scale is not None:
        return scaled(weight, _unsigned(scale), block_of(weight, scale, block_sizes(config)))
    return None


def _int4(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Matrix | None:
    qweight, qzeros, scales = (parts.get(name) for name in ("qweight", "qzeros", "scales"))
    if qweight is None or qzeros is None or scales is None or config.get("bits", 4) != 4:
        return None
    if qweight.shape[-1] == scales.shape[-1]:
        version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
        return gptq(qweight, qzeros, scales, parts.get("g_idx"), version=version)
    return awq(qweight, qzeros, scales)


def _packed(packed: Tensor, scale: Tensor, parts: Mapping[str, Tensor]) -> Matrix | None:
    if packed.dtype == torch.int32:
        order, shape = parts.get("weight_g_idx"), parts.get("weight_shape")
        if shape is None or (order is not None and bool((order.diff() < 0).any())):
            return None
        return pack_quantized(packed, scale, int(shape[-1]), parts.get("weight_zero_point"))
    if packed.dtype == torch.uint8 and "weight_global_scale" in parts:
        return nvfp4(packed, scale, parts["weight_global_scale"], divide=True)
    return mxfp4(packed, scale) if packed.dtype == torch.uint8 else None


def _unsigned(scale: Tensor) -> Tensor:
    return scale if scale.ndim else scale.reshape(1)
