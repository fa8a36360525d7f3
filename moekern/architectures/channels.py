"""The channels of experts, found from names, types and shapes: along which axis of each tensor they lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any, get_args

from moekern.architectures.layout import ExpertTensor, Form, Projection
from moekern.architectures.patterns import Scheme
from moekern.architectures.quantisation import block_sizes, group_weights, packed_bits, quantisation_of
from moekern.architectures.table import Family
from moekern.checkpoint.folder import Checkpoint

PLAIN = ("F64", "F32", "BF16", "F16")
CODES = ("", "weight", "weight_packed", "packed", "blocks")  # what follows a projection's name in a tensor's
SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale", "scales")
BESIDE = ("weight_shape", "weight_g_idx", "input_scale")  # parts that may be there too
KINDS = {
    **{(code, dtype): "fp8" for code in ("", "weight") for dtype in ("F8_E4M3", "F8_E5M2")},
    **{(code, "I8"): "int8" for code in ("", "weight")},
    **{(code, "I32"): "packed" for code in ("weight_packed", "packed")},
}
PROJECTIONS: dict[str, Projection] = {name: name for name in get_args(Projection)}

Named = Iterable[tuple[ExpertTensor, str]]  # a tensor, and the name of its projection
Parts = dict[str, tuple[str, tuple[int, ...]]]  # ending -> dtype and shape of what one expert has of a projection


@dataclass(frozen=True, slots=True)
class Matrix:
    """[R, C] that the parts of a projection stand for; kind: of the format, "" for plain numbers; the endings of what
    holds its numbers, or codes of them, and its scales."""

    shape: tuple[int, ...]
    kind: str
    code: str
    scale: str

    @property
    def coded(self) -> bool:
        return bool(self.kind)


def fused_axis(shape: Sequence[int], others: Sequence[Sequence[int]]) -> int | None:
    """The axis along which a projection of `shape` holds gate and up, as the one other, down, tells; None if it does
    not: [2I, H] beside [H, I], or [H, 2I] beside [I, H]."""
    if len(others) != 1:
        return None
    (a, b), (c, d) = shape, others[0]
    return 0 if (a, b) == (2 * d, c) else 1 if (a, b) == (d, 2 * c) else None


def with_channels(
    checkpoint: Checkpoint, family: Family, scheme: Scheme, num_experts: int, named: Named
) -> tuple[list[ExpertTensor], int | None, int]:
    """A block's expert tensors with projections and channels, the width, and what divides the widths that their format
    can hold, 0 for plain numbers. Where they are neither the matrices, with or without biases, that the scheme stands
    for, nor the parts of such in a format that is known, the width is None and no tensor has channels."""
    given = [(replace(tensor, projection=PROJECTIONS[scheme.parts[name]]), name) for tensor, name in named]
    unknown = [tensor for tensor, _ in given], None, 0
    found: dict[str, Parts] = {}
    for tensor, name in given:
        entry, ending = checkpoint.tensors[tensor.name], _ending(tensor.name, name)
        part = entry.dtype, _of_one(entry.shape, scheme, num_experts)
        before = found.setdefault(tensor.projection, {}).setdefault(ending, part)
        if before[1] != part[1] or (before[0] != part[0] and not {before[0], part[0]} <= {*PLAIN}):
            return unknown
    bits = bits_of(checkpoint.config)
    matrices = {projection: matrix_of(parts, bits) for projection, parts in found.items()}
    if matrices.keys() != set(scheme.parts.values()):
        return unknown
    known = {projection: matrix for projection, matrix in matrices.items() if matrix is not None}
    coded = [matrix.coded for matrix in known.values()]
    if len(known) < len(matrices) or any(coded) != all(coded) or (any(coded) and scheme.rows):
        return unknown
    sides = _sides({projection: matrix.shape for projection, matrix in known.items()}, scheme)
    if sides is None:
        return unknown
    axes, width = sides
    steps = [step_of(found[name], known[name], axes[name], checkpoint.config) for name in known]
    if any(coded) and 0 in steps:
        return unknown
    shift = 0 if scheme.indexed or scheme.rows else 1  # the experts of a stack are its first axis
    out = []
    for tensor, name in given:
        fused = tensor.projection == "gate_up"
        alternates = bool(family.alternating) and name.startswith(family.alternating)
        form: Form = ("alternating" if alternates else "halves") if fused else "plain"
        ending = _ending(tensor.name, name)
        _, shape = found[tensor.projection][ending]
        axis = axis_of(ending, shape, axes[tensor.projection])
        if ending == "bias":
            axis = None if tensor.projection == "down" else 0
            if axis is not None and shape != (2 * width if fused else width,):
                return unknown
        out.append(replace(tensor, channel_axis=None if axis is None else axis + shift, channel_form=form))
    return out, width, lcm(*steps) if any(coded) else 0


def bits_of(config: Mapping[str, Any]) -> int:
    """Of each integer that is packed into words; 0 where groups of modules have several."""
    named = {*packed_bits(quantisation_of(config))} or {4}
    return named.pop() if len(named) == 1 else 0


def matrix_of(parts: Parts, bits: int = 4) -> Matrix | None:
    """The matrix that an expert's parts stand for; None where it is not known, or there are others. bits: `bits_of`."""
    endings = {ending for ending in parts if ending != "bias"}
    if any(parts[ending][0] not in PLAIN for ending in parts if ending == "bias"):
        return None
    codes, scales = [e for e in endings if e in CODES], [e for e in endings if e in SCALES]
    if len(codes) != 1:
        return None
    (dtype, shape), (code,) = parts[codes[0]], codes
    if dtype in PLAIN:
        return Matrix(shape, "", code, "") if endings == {code} and code in ("", "weight") and len(shape) == 2 else None
    if len(scales) != 1 or not endings <= {code, *scales, *BESIDE}:
        return None
    kind = KINDS.get((code, dtype), "")
    if dtype in ("I8", "U8") and parts[scales[0]][0] in ("U8", "F8_E8M0"):
        kind = "mxfp4"
    if kind == "packed" and ("weight_shape" not in parts or not bits):
        return None
    if code == "blocks":
        whole = (shape[0], 32 * shape[1]) if len(shape) == 3 and shape[2] == 16 else ()
    else:
        columns = shape[-1] * 32 // bits if kind == "packed" else shape[-1] * 2 if kind == "mxfp4" else shape[-1]
        whole = (shape[0], columns) if len(shape) == 2 else ()
    return Matrix(whole, kind, code, scales[0]) if kind and whole else None


def step_of(parts: Parts, matrix: Matrix, axis: int, config: Mapping[str, Any]) -> int:
    """What divides the numbers that stay of a matrix along an axis: whole blocks of one scale, and whole words. 1 where
    any number can, 0 where it is not known."""
    if not matrix.coded:
        return 1
    size, blocks = matrix.shape[axis], (*parts[matrix.scale][1], 1, 1)[axis]
    if blocks < 1:
        return 0
    if matrix.kind == "mxfp4":
        return 32 if axis == 1 else 1
    if matrix.kind == "packed":
        if axis == 0:
            return 1
        if size % blocks:
            return 0
        in_words = 32 // gcd(32, bits_of(config))
        return lcm(in_words, size // blocks if blocks > 1 else next(iter(_groups(config)), 1))
    for pair in block_sizes(quantisation_of(config)):
        if tuple(-(-whole // side) for whole, side in zip(matrix.shape, pair, strict=True)) == parts[matrix.scale][1]:
            return pair[axis]
    if blocks in (1, size):
        return 1
    power = 1 << (-(-size // blocks) - 1).bit_length()  # as `kernels.quantised.block_of` finds it
    return power if -(-size // power) == blocks else 0


def axis_of(ending: str, shape: Sequence[int], axis: int) -> int | None:
    """The axis of a part along which the channels of its matrix lie, which are that matrix's `axis`."""
    if ending == "weight_g_idx":
        return 0 if axis == 1 else None
    if ending in CODES:
        return axis
    return axis if ending in SCALES and len(shape) > axis and shape[axis] > 1 else None


def _groups(config: Mapping[str, Any]) -> list[int]:
    """The sizes of groups of columns that a quantiser's settings name."""
    sizes = (weights.get("group_size") for weights in group_weights(quantisation_of(config)))
    return [size for size in sizes if type(size) is int and size > 0]


def _ending(name: str, projection: str) -> str:
    """What follows the projection's name in a tensor's: "" or "weight" of the matrix itself."""
    return name.rpartition(projection)[2].lstrip("._")


def _of_one(shape: tuple[int, ...], scheme: Scheme, num_experts: int) -> tuple[int, ...]:
    """The shape of one expert's part of a tensor."""
    if scheme.indexed:
        return shape
    return (shape[0] // num_experts, *shape[1:]) if scheme.rows else shape[1:]


def _sides(shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[dict[str, int], int] | None:
    """Projection -> the axis of one expert's matrix that is its channels; and their number."""
    if any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
        return None
    down = shapes["down"]
    if scheme.rows:
        return (dict.fromkeys(shapes, 0), down[0]) if set(shapes.values()) == {down} else None
    if "gate_up" in shapes:
        axis = fused_axis(shapes["gate_up"], [down])
        return None if axis is None else ({"gate_up": axis, "down": 1 - axis}, down[1 - axis])
    outer = {shape for projection, shape in shapes.items() if projection != "down"}
    return ({"gate": 0, "up": 0, "down": 1}, down[1]) if outer == {down[::-1]} else None
