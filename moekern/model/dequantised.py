"""Quantised tensors of a checkpoint: which weight each is a part of, and the numbers that the parts stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moekern.architectures.quantisation import (
    BITS,
    FORMS,
    bits_of,
    block_sizes,
    form_of_awq,
    packed_bits,
    zero_points_of,
)
from moekern.kernels import Quantised, dequantize
from moekern.kernels.quantised import E8M0, awq, block_of, gptq, mxfp4, nvfp4, pack_quantized, scaled

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHT = "weight"  # the part that a weight stored as it is consists of
CODES = ("weight", "weight_packed", "packed", "qweight", "blocks")
SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale", "qscale_weight")
PART = re.compile(
    r"(?P<module>.*?)(?P<mark>[._])(?P<part>weight_packed|weight_scale_inv|weight_scale_2|weight_scale|"
    r"weight_global_scale|weight_zero_point|weight_shape|weight_g_idx|weight|scale_inv|scales|scale|blocks|packed|"
    r"qweight|qzeros|g_idx|qscale_weight|qscale_act|input_scale|input_global_scale|input_zero_point|output_scale|"
    r"pre_quant_scale)"
)
COMMON = ("weight", "scale", "scales", "blocks", "packed")  # names that parameters of models have too


def readings(name: str) -> Iterator[tuple[str, str]]:
    """What a tensor of this name may be: (plain weight, part), the likeliest first, itself among them."""
    found = PART.fullmatch(name)
    if found is None:
        yield name, WEIGHT
        return
    module, mark, part = found["module"], found["mark"], found["part"]
    if part in COMMON:
        yield name, WEIGHT
    if part != WEIGHT:
        if mark == "." or part.startswith(WEIGHT):
            yield f"{module}{mark}weight", part  # x.qweight is of x.weight, x.w13_weight_scale of x.w13_weight
        yield module, part  # x.gate_up_proj_blocks is of x.gate_up_proj
    if part not in COMMON:
        yield name, WEIGHT


def is_coded(name: str, tensor: Tensor) -> bool:
    """Whether a tensor may be a part of a quantised weight, by its name and dtype."""
    return tensor.dtype not in FLOATS or any(part != WEIGHT for _, part in readings(name))


def dense(parts: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The weight as the model computes with it, in `dtype`: [R, C], or [E, R, C] of a stack; a plain one as it is.

    MXFP4 `blocks`, which store the transpose of what gpt-oss computes with, become [E, C, R]. Raises ValueError for
    tensors that do not belong together and for layouts that moekern does not know.
    """
    found = matrix_of(parts, config)
    if not isinstance(found, Quantised):
        return found
    if "blocks" not in parts:
        return dequantize(found, dtype)
    out = torch.empty(len(found.codes), found.columns, found.rows, dtype=dtype, device=found.codes.device)
    for e in range(len(out)):  # the transposing copy is of one expert, not of a stack
        out[e] = dequantize(found.expert(e), dtype)[0].T
    return out if found.stacked else out[0]


def matrix_of(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor | Quantised:
    """A weight as its parts hold it: itself where it is plain. Raises ValueError for a layout that is not known."""
    codes, scales = ([name for name in names if name in parts] for names in (CODES, SCALES))
    for found in (codes, scales):
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]} are both there, and one of them is the weight's")
    if "pre_quant_scale" in parts:
        raise ValueError("pre_quant_scale: weights for inputs that are scaled are not a layout that moekern reads")
    known = None
    if codes:
        known = _stored(parts, codes[0], parts[scales[0]] if scales else None, config)
    if known is None:
        what = ", ".join(f"{part} {_short(t)}" for part, t in sorted(parts.items()))
        method = f" ({name})" if isinstance(name := config.get("quant_method"), str) else ""
        raise ValueError(f"{what:.300}{method:.60} are not a weight layout that moekern reads")
    return known


def _stored(
    parts: Mapping[str, Tensor], codes: str, scale: Tensor | None, config: Mapping[str, Any]
) -> Tensor | Quantised | None:
    weight = parts[codes]
    if codes == "qweight":
        return _in_words(parts, config)
    if codes == "blocks":
        return mxfp4(weight, parts["scales"]) if "scales" in parts else None
    if weight.dtype in FLOATS and codes == WEIGHT:
        return weight
    if scale is None or weight.ndim not in (2, 3):
        return None
    if weight.dtype == torch.int32:
        return _packed(weight, scale, parts, config)
    zero = parts.get("weight_zero_point")
    if zero is not None and not bool((zero.float() != 0).any()):
        zero = None
    if zero is not None and weight.dtype != torch.int8:
        raise ValueError(
            f"weight_zero_point: zero points of {_short(weight)} codes are not a layout that moekern reads"
        )
    if weight.dtype == torch.uint8 and "weight_scale_2" in parts:
        return nvfp4(weight, scale, parts["weight_scale_2"])
    if weight.dtype == torch.uint8 and "weight_global_scale" in parts:
        return nvfp4(weight, scale, parts["weight_global_scale"], divide=True)
    if weight.dtype in (torch.uint8, torch.int8) and scale.dtype in (torch.uint8, E8M0):
        return mxfp4(weight.view(torch.uint8), scale)
    if weight.dtype in FLOAT8 or (weight.dtype == torch.int8 and config.get("quant_method") != "fp8"):
        grid = _grid(weight, scale)
        return scaled(weight, grid, block_of(weight, grid, block_sizes(config)), zero)
    return None


def _grid(weight: Tensor, scale: Tensor) -> Tensor:
    """Scales of FP8 or int8 with as many dimensions as the weight: one a row or an expert is a column of them."""
    if scale.dtype == torch.uint8:
        scale = scale.view(E8M0)
    if scale.ndim == 0:
        return scale.reshape(1)
    if scale.ndim < weight.ndim and scale.numel() > 1 and scale.shape == weight.shape[: scale.ndim]:
        return scale.reshape(*scale.shape, *[1] * (weight.ndim - scale.ndim))
    return scale


def _in_words(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Quantised | None:
    """GPTQ and AWQ, AutoRound's among them: which of both, the shapes say."""
    qweight, qzeros, scales = (parts.get(name) for name in ("qweight", "qzeros", "scales"))
    if qweight is None or qzeros is None or scales is None or min(qweight.ndim, qzeros.ndim, scales.ndim) < 2:
        return None
    named, outputs = config.get("bits", config.get("w_bit", 4)), scales.shape[-1]
    if qweight.shape[-1] == outputs:
        bits = _bits(named, bits_of(config, "gptq"), outputs, qzeros.shape[-1], "qzeros")
        version, by_gptqmodel = zero_points_of(config)
        return gptq(qweight, qzeros, scales, parts.get("g_idx"), bits=bits, version=version, by_gptqmodel=by_gptqmodel)
    if str(form_of_awq(config) or "gemm").lower() not in FORMS["awq"]:
        return None
    bits = _bits(named, bits_of(config, "awq"), outputs, qweight.shape[-1], "qweight")
    return awq(qweight, qzeros, scales, bits=bits)


def _bits(named: Any, known: tuple[int, ...], numbers: int, words: int, part: str) -> int:
    """How many bits the codes of a module have: as many as config.json says of all, or others, which the words of so
    many numbers show."""
    if type(named) is not int or named not in known:
        what = f"of this method {', '.join(map(str, known))} bits are"
        raise ValueError(f"weights of {named!r:.20} bits are not a layout that moekern reads; {what}")
    found = [bits for bits in (named, *known) if -(-numbers * bits // 32) == words]
    if not found:
        what = f"{words} words for {numbers} numbers hold none of {', '.join(map(str, known))} bits"
        raise ValueError(f"{part}: {what}")
    return found[0]


def _packed(packed: Tensor, scale: Tensor, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Quantised | None:
    shape, order, zero = (parts.get(f"weight_{name}") for name in ("shape", "g_idx", "zero_point"))
    if shape is None or not shape.numel() or shape.dtype not in INTEGERS or not scale.ndim:
        return None
    columns, groups = int(shape.flatten()[-1]), scale.shape[-1]
    known = BITS["pack-quantized"]
    named = next((bits for bits in packed_bits(config) if bits in known), 4)
    bits = _bits(named, known, columns, packed.shape[-1], "weight_packed")
    if order is not None and (order.dtype not in INTEGERS or order.shape != (columns,)):
        raise ValueError(f"weight_g_idx: expected the groups of {columns} columns, got {_short(order)}")
    if order is None or not bool((order.diff() < 0).any()):
        return pack_quantized(packed, scale, columns, zero, bits=bits)
    # Columns of a group lie apart: every column gets its own scale, which is its group's.
    if order.min() < 0 or order.max() >= groups:
        raise ValueError(f"weight_g_idx: expected the groups of columns, from 0 to {groups - 1}")
    if zero is not None and zero.shape[-1:] != (groups,):
        raise ValueError(f"weight_zero_point: expected those of {groups} groups, got {_short(zero)}")
    column = order.long()
    own = None if zero is None else zero[..., column].contiguous()
    return pack_quantized(packed, scale[..., column].contiguous(), columns, own, bits=bits)


def _short(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
