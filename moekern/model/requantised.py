"""Computed weights in the format that a checkpoint stores its own in: the inverse of `dequantised.dense`.

Each block of numbers has one scale. Two or three are tried, the one that the checkpoint has there and those that the
format's makers would choose, and the block is stored with the one that leaves the least squared error; so what a
checkpoint's own parts stand for is stored as these parts again, or as others that stand for the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from moekern.architectures.quantisation import OF_INPUTS
from moekern.kernels import Quantised
from moekern.kernels.quantised import BITS, E8M0
from moekern.model.dequantised import CODES, SCALES, dense, matrix_of
from moekern.model.reader import DTYPES
from moekern.model.transformers_api import Loader

FLOAT_CODES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}  # codes reach it on both sides
PACKED = tuple(f"packed{bits}" for bits in BITS)
INTEGERS = {
    "int8": (-128, 127),
    **{name: (-(1 << b - 1), (1 << b - 1) - 1) for name, b in zip(PACKED, BITS, strict=True)},
}
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of e2m1, by code
# Between two of them; a tie goes to the even code, so those after an odd one are a little less.
_HALVES = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
BOUNDS = torch.where(torch.arange(7) % 2 == 1, torch.nextafter(_HALVES, torch.zeros(7)), _HALVES)


class Requantised(NamedTuple):
    """parts: as they are stored, by the names that `like` had. Sums over all numbers of the weight, in float64: what is
    stored less the weight, squared, and the weight, squared; those of several weights add up."""

    parts: dict[str, Tensor]
    error_square: float
    square: float


def check_written(like: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Raise ValueError where the format that a weight's parts are in is read alone, or not known."""
    found = matrix_of(like, config)
    if not isinstance(found, Quantised):
        return
    name = next(name for name in CODES if name in like)
    if found.coding not in (*FLOAT_CODES, *INTEGERS, "e2m1") or found.zero is not None or found.group is not None:
        raise ValueError(f"{name}: weights of this format ({found.coding}, zero points) are read, and not written")
    if found.coding == "e2m1" and found.scale.dtype != torch.uint8:
        raise ValueError(f"{name}: NVFP4 weights are read, and not written")


def requantised(
    weight: Tensor, like: Mapping[str, Tensor], config: Mapping[str, Any], *, anew: bool = True
) -> Requantised:
    """Store `weight` float32 [.., R, C], as `dense` gives it, in the format that `like` is in.

    like: the parts of the same weight in the checkpoint, where R or C may be larger; config: what config.json says of
    the format. Codes are rounded to nearest, ties to even. Without `anew` all scales stay those of `like`. Written are
    plain numbers, FP8 and int8 with scales of blocks of any size, of rows, of experts or one a tensor, MXFP4, and
    compressed-tensors' packed integers without zero points. Memory: the numbers that are stored, in float32, and a few
    copies of one expert's.
    Raises ValueError for other formats, for a weight that is not finite, and for shapes whose blocks cannot be.
    """
    if weight.dtype != torch.float32 or not bool(weight.isfinite().all()):
        raise ValueError("weight: expected finite numbers in float32")
    check_written(like, config)
    found = matrix_of(like, config)
    if isinstance(found, Quantised):
        parts = _parts(weight.mT if "blocks" in like else weight, found, like, config, anew=anew)
    else:
        parts = {**like, next(name for name in CODES if name in like): weight.to(found.dtype)}
    error = square = 0.0
    stored = dense(parts, config, torch.float32).reshape(-1, *weight.shape[-2:])
    for old, new in zip(weight.reshape(stored.shape), stored, strict=True):
        error += float((new.double() - old).square().sum())
        square += float(old.double().square().sum())
    if not math.isfinite(error):
        raise ValueError("weight: its numbers are too large for the format")
    return Requantised(parts, error, square)


def weights_of(loader: Loader, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Plain weight -> part -> key, for keys of a checkpoint that the model computes with: the names of what `dense` and
    `requantised` take. A plain weight is its only part; scales of inputs are of none."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        weight, part, target = loader.part_of(key)
        if target is not None and part not in OF_INPUTS:
            found.setdefault(weight, {})[part] = key
    return found


def as_stored(tensor: Tensor) -> tuple[str, tuple[int, ...], memoryview]:
    """dtype by its name in safetensors, shape, and the bytes, as `pruning.refitted.write_layer` takes them."""
    name = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return name, tuple(tensor.shape), flat.view(torch.uint8).numpy().data


def _parts(
    weight: Tensor, found: Quantised, like: Mapping[str, Tensor], config: Mapping[str, Any], *, anew: bool
) -> dict[str, Tensor]:
    names = [name for name in CODES if name in like]
    scales = [name for name in (*SCALES, "scales") if name in like]
    scale = like[scales[0]]
    lead, (R, C) = weight.shape[:-2], weight.shape[-2:]
    rows = weight.reshape(1, -1, C) if scale.numel() == 1 else weight.reshape(-1, R, C)
    block = _block(found, scale, rows.shape[1], C)
    if found.coding in ("e2m1", *PACKED) and C % block[1]:
        raise ValueError(f"{names[0]}: {C} columns are no whole number of groups of {block[1]}")
    powers = found.scale.dtype == torch.uint8 or config.get("scale_fmt") == "ue8m0"
    own = (
        _numbers(scale).reshape(len(rows), *found.scale.shape[1:]) if rows.shape == _dense_shape(found, scale) else None
    )
    if own is None and not anew:
        raise ValueError(f"{names[0]}: scales of another shape than the weight's")
    codes, grids = [], []
    for e in range(len(rows)):  # several copies of one expert are held, not of a stack
        values, grid = _coded(
            rows[e].contiguous(), found.coding, block, scale.dtype, powers, None if own is None else own[e], anew=anew
        )
        codes.append(_as_codes(values, found, like[names[0]], scale))
        grids.append(grid)
    grid = torch.stack(grids)
    parts = {**like}
    parts[names[0]] = torch.stack(codes).reshape(*lead, R, *codes[0].shape[1:])
    parts[scales[0]] = _as_scale(grid.reshape(*([*lead] if scale.numel() > 1 else []), *grid.shape[-2:]), scale)
    if "weight_shape" in like:
        shape = like["weight_shape"]
        parts["weight_shape"] = torch.tensor([R, C], dtype=shape.dtype).reshape(shape.shape)
    if "weight_g_idx" in like:
        order = like["weight_g_idx"]
        parts["weight_g_idx"] = (torch.arange(C) // block[1]).to(order.dtype)
    if "weight_zero_point" in like:
        parts["weight_zero_point"] = torch.zeros_like(parts[scales[0]], dtype=like["weight_zero_point"].dtype)
    return parts


def _block(found: Quantised, scale: Tensor, R: int, C: int) -> tuple[int, int]:
    """Rows and columns of a scale, where those of one number, or of a number a row, are as long as the weight."""
    S, Q = found.scale.shape[1:]
    if scale.numel() == 1 or (S, Q) == (1, 1):
        return R, C
    return (found.block[0], C) if Q == 1 and found.block[1] >= found.columns else found.block


def _dense_shape(found: Quantised, scale: Tensor) -> tuple[int, ...]:
    """Of the rows that `scale` is for: one number is for those of all experts."""
    E = len(found.codes)
    return (1, E * found.rows, found.columns) if scale.numel() == 1 else (E, found.rows, found.columns)


def _coded(
    weight: Tensor,
    coding: str,
    block: tuple[int, int],
    dtype: torch.dtype,
    powers: bool,
    own: Tensor | None,
    *,
    anew: bool,
) -> tuple[Tensor, Tensor]:
    """Values of the codes [R, C] and scales [S, Q], float32, of one matrix. own: the scales that it has had."""
    largest = _by_block(weight.abs(), block).amax((1, 3))
    candidates = [] if own is None else [own]
    for made in _scales(largest, coding, powers) if anew else ():
        candidates.append(_numbers(made.to(E8M0 if dtype == torch.uint8 else dtype)))
    best_values, best_scale, least = None, None, None
    for scale in candidates:
        usable = (scale > 0) & scale.isfinite()
        spread = _spread(torch.where(usable, scale, 1), block, weight)
        values = _rounded(weight / spread, coding)
        error = _by_block((values * spread - weight).double().square(), block).sum((1, 3))
        error = torch.where(usable, error, torch.inf)
        if best_values is None or best_scale is None or least is None:
            best_values, best_scale, least = values, scale, error
            continue
        better = error < least
        best_values = torch.where(_spread(better, block, weight), values, best_values)
        best_scale, least = torch.where(better, scale, best_scale), torch.where(better, error, least)
    assert best_values is not None
    assert best_scale is not None
    return best_values, best_scale


def _scales(largest: Tensor, coding: str, powers: bool) -> list[Tensor]:
    """What makers of the formats choose for blocks whose largest magnitudes are these: MXFP4 the power of two that is
    2^(exponent - 2) (OCP Microscaling 1.0), or the next, with which nothing is cut; other floats largest / 448, the
    next power of two where scales are such; integers as compressed-tensors does, largest / 7.5 and largest / 127.5."""
    there = largest.clamp(min=torch.finfo(torch.float32).tiny)
    if coding == "e2m1":
        low = torch.frexp(there).exponent - 3
        found = [torch.ldexp(torch.ones_like(there), low + step) for step in (0, 1)]
    else:
        reach = LARGEST[coding] if coding in LARGEST else (INTEGERS[coding][1] - INTEGERS[coding][0]) / 2
        scale = there / reach
        if powers:
            mantissa, exponent = torch.frexp(scale)
            scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        found = [scale]
    return [torch.where(largest > 0, scale, 1) for scale in found]


def _rounded(values: Tensor, coding: str) -> Tensor:
    """The nearest values of the codes, ties to even, those out of reach at its end."""
    if coding in INTEGERS:
        return values.round().clamp(*INTEGERS[coding])
    if coding in FLOAT_CODES:
        return values.clamp(-LARGEST[coding], LARGEST[coding]).to(FLOAT_CODES[coding]).float()
    code = torch.bucketize(values.abs(), BOUNDS.to(values.device))
    return MAGNITUDES.to(values.device)[code].copysign(values)


def _as_codes(values: Tensor, found: Quantised, like: Tensor, scale: Tensor) -> Tensor:
    """[R, C] of the codes' values as they are stored."""
    if found.coding in FLOAT_CODES:
        return values.to(FLOAT_CODES[found.coding])
    if found.coding == "int8":
        return values.to(torch.int8)
    if found.coding in PACKED:
        return _words((values + (1 << found.bits - 1)).to(torch.int64), found.bits)
    code = torch.bucketize(values.abs(), BOUNDS.to(values.device)) | values.signbit().long() << 3
    octets = (code[..., ::2] | code[..., 1::2] << 4).to(torch.uint8)
    return octets.unflatten(-1, (-1, 16)) if like.ndim == scale.ndim + 1 else octets.view(like.dtype)


def _words(codes: Tensor, bits: int) -> Tensor:
    """[R, C] int64 -> [R, ceil(C · bits / 32)] int32: 32 codes fill as many words as they have bits."""
    runs, words = pad(codes, (0, -codes.shape[-1] % 32)).unflatten(-1, (-1, 32)), []
    for word in range(bits):
        first, last = 32 * word // bits, -(-32 * (word + 1) // bits)
        shift = torch.arange(first, last, device=codes.device) * bits - 32 * word
        part = runs[..., first:last]
        moved = torch.where(shift < 0, part >> (-shift).clamp(min=0), part << shift.clamp(min=0))
        words.append(moved.sum(-1) & 0xFFFFFFFF)
    found = torch.stack(words, -1).flatten(-2)[:, : -(-codes.shape[-1] * bits // 32)]
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)


def _as_scale(grid: Tensor, like: Tensor) -> Tensor:
    """Scales [.., S, Q] in the dtype and the form that `like` has: one number, one a row, or a grid."""
    if like.dtype in (torch.uint8, E8M0):
        grid = grid.to(E8M0).view(like.dtype)
    grid = grid.to(like.dtype)
    if like.numel() == 1:
        return grid.reshape(like.shape)
    while grid.ndim > like.ndim:
        grid = grid.squeeze(-1)
    return grid


def _numbers(scale: Tensor) -> Tensor:
    return (scale.view(E8M0) if scale.dtype == torch.uint8 else scale).float()


def _by_block(values: Tensor, block: tuple[int, int]) -> Tensor:
    """[S, rows, Q, columns] of [R, C]; what a block lacks is 0."""
    R, C = values.shape
    whole = pad(values, (0, -C % block[1], 0, -R % block[0]))
    return whole.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))


def _spread(grid: Tensor, block: tuple[int, int], like: Tensor) -> Tensor:
    """[S, Q] as a number for each of [R, C]."""
    rows = grid.repeat_interleave(block[0], 0)[: like.shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : like.shape[1]]
