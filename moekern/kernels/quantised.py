"""Quantised weights as checkpoints store them, and what they stand for.

One function for each layout takes the stored tensors, checks their shapes and returns a `Quantised`; no code is copied.
`dequantize` turns that into a dense weight, `weight_stats` and `stable_rank` read it as it is. Everywhere [.., R, C] is
the weight of a linear layer, R outputs and C inputs, alone [R, C] or stacked over the experts [E, R, C], and the stored
tensors of a stack have the same leading E. Each function raises ValueError for a wrong argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moekern.kernels.checks import FLOATS, check_tensors

BYTES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}
E8M0 = torch.float8_e8m0fnu
# Of integers that are packed into 32-bit words, one after another from the lowest bits up; 3 bits straddle words.
BITS = (2, 3, 4, 8)
ONES = {2: [0x55555555], 4: [0x11111111], 8: [0x01010101]}  # one in each of a word's codes
ONES_OF_GPTQMODEL = [0x24924924, 0x92492492, 0x49249249]  # of 3 bits, in each third word
AWQ_PLACES = {4: (0, 4, 1, 5, 2, 6, 3, 7), 8: (0, 2, 1, 3)}  # where in a word AWQ has its columns


@dataclass(frozen=True)
class Quantised:
    """w[e, r, c] = (value(code) - zero[e, s, q]) · scale[e, s, q], s = group[e, r] or r // block[0], q = c // block[1].

    Made by the functions below. GPTQ and AWQ store the transpose: their rows are the layer's inputs. coding: e4m3,
    e5m2, int8 or e2m1, or packed, awq or rows with their bits, which count from half of what they reach (4 bits from
    -8): a symmetric zero point is then no zero point at all.
    """

    codes: Tensor  # [E, L, B] uint8: a row is a line; with rows.. a line is a 32-bit word of each column
    coding: str
    scale: Tensor  # [E, S, Q] float32, bfloat16, float16, or uint8 for powers of two biased by 127
    zero: Tensor | None  # [E, S, Q] float32
    group: Tensor | None  # [E, R] int32
    block: tuple[int, int]
    rows: int
    columns: int
    stacked: bool
    transposed: bool = False

    @property
    def bits(self) -> int:
        """Of a code that is packed into words."""
        return int(self.coding[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight: [R, C] or [E, R, C]."""
        sides = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return (len(self.codes), *sides) if self.stacked else sides

    def expert(self, e: int) -> Quantised:
        """One expert of a stack, as a stack of one; nothing is copied."""
        codes, scale = self.codes[e : e + 1], self.scale[e : e + 1]
        zero, group = (None if t is None else t[e : e + 1] for t in (self.zero, self.group))
        return replace(self, codes=codes, scale=scale, zero=zero, group=group, stacked=True)


def scaled(
    weight: Tensor, scale: Tensor, block: tuple[int, int] | None = None, zero: Tensor | None = None
) -> Quantised:
    """FP8 or int8 weights: weight [.., R, C] float8_e4m3fn, float8_e5m2 or int8, w = (weight - zero) · scale.

    With a block, scale is [.., ceil(R / block[0]), ceil(C / block[1])] (`weight_scale_inv` with 128 x 128). Without, it
    is one number for the tensor, or [.., 1, 1] for each expert, or [.., R, 1] for each row. Its dtype is float32,
    bfloat16, float16, or float8_e8m0fnu. Zero points, where there are any, have the scales' shape.
    """
    op = "scaled"
    codes, stacked = _stack(op, "weight", weight)
    if isinstance(scale, Tensor) and scale.numel() == 1:
        scale = scale.reshape(1, 1, 1).expand(len(codes), 1, 1).contiguous()
    scales, _ = _stack(op, "scale", scale)
    sizes = check_tensors(op, {
        "weight": (codes, "E R C", tuple(BYTES)),
        "scale": (scales, "E S Q", (*FLOATS, E8M0)),
    })  # fmt: skip
    if zero is not None:
        _expect(op, "zero", "as many as scales", scale.numel() if scale.ndim else 1, zero.numel())
        zero = zero.float().reshape(scales.shape[-2:] if zero.numel() == 1 else scales.shape).expand(scales.shape)
        zero = zero.contiguous()
    R, C, S, Q = (sizes[name] for name in "RCSQ")
    if block is None:
        if S not in (1, R) or Q != 1:
            raise ValueError(f"[{op}] block: expected a block size for scales of shape {list(scale.shape)}, got None")
        block = (1 if S == R else max(R, 1), max(C, 1))
    _expect_blocks(op, "scale", (S, Q), (R, C), block)
    return Quantised(_bytes(codes), BYTES[weight.dtype], _scales(scales), zero, None, block, R, C, stacked)


def block_of(weight: Tensor, scale: Tensor, sizes: Sequence[tuple[int, int]] = ()) -> tuple[int, int] | None:
    """The block of scales in a grid, for `scaled`, where a checkpoint names blocks of these sizes; None for scales of a
    row or of the whole.

    The shape decides: a grid that is the one of a size is that, [R, 1] otherwise rows. Where both are true they mean
    the same. A grid of no size that is named is one of powers of two, or of equal parts; raises ValueError where it can
    be neither.
    """
    if scale.ndim < 2:
        return None
    (R, C), (S, Q) = weight.shape[-2:], scale.shape[-2:]
    for size in sizes:
        if (-(-R // size[0]), -(-C // size[1])) == (S, Q):
            return size
    if Q == 1 and S in (1, R):
        return None
    return sizes[0] if sizes else (_side(R, S), _side(C, Q))


def _side(numbers: int, blocks: int) -> int:
    """How long blocks are: the power of two that gives so many of them, of which there is one at most, or a part."""
    if blocks < 2:
        return max(numbers, 1)
    near = 1 << max(0, -(-numbers // blocks) - 1).bit_length()  # the least that gives no more blocks
    if -(-numbers // near) == blocks:
        return near
    if numbers % blocks:
        raise ValueError(f"scale: {blocks} blocks of {numbers} numbers: config.json does not say how large they are")
    return max(numbers // blocks, 1)


def mxfp4(blocks: Tensor, scales: Tensor) -> Quantised:
    """MXFP4: blocks uint8 [.., R, G, 16] or [.., R, 16·G], the low four bits first, scales [.., R, G].

    A scale is for 32 columns. This is gpt-oss's `*_blocks` and `*_scales`, compressed-tensors' mxfp4 (`weight_packed`,
    `weight_scale`) and DeepSeek V4's int8 weight viewed as uint8. Scales are uint8 or float8_e8m0fnu: 2^(s - 127), and
    NaN for 255 as in the OCP Microscaling specification 1.0. R is the output dimension; transformers' gpt-oss computes
    with the transpose.
    """
    op = "mxfp4"
    packed = blocks.flatten(-2) if blocks.ndim == scales.ndim + 1 and blocks.shape[-1] == 16 else blocks
    codes, stacked = _stack(op, "blocks", packed)
    exponents = _scales(_stack(op, "scales", scales)[0])
    sizes = check_tensors(op, {
        "blocks": (codes, "E R B", (torch.uint8,)),
        "scales": (exponents, "E R G", (torch.uint8,)),
    })  # fmt: skip
    R, C = sizes["R"], 32 * sizes["G"]
    _expect(op, "blocks", "16 bytes a scale", C // 2, sizes["B"])
    return Quantised(codes, "e2m1", exponents, None, None, (1, 32), R, C, stacked)


def nvfp4(packed: Tensor, scale: Tensor, global_scale: Tensor, *, divide: bool = False) -> Quantised:
    """NVFP4: packed uint8 [.., R, C/2], the low four bits first, scale float8_e4m3fn [.., R, C/16], one global scale.

    w = code · scale · global_scale in ModelOpt's checkpoints (`weight`, `weight_scale`, `weight_scale_2`); with divide
    code · (scale / global_scale), as in compressed-tensors' (`weight_packed`, `weight_scale`, `weight_global_scale`).
    global_scale has one number, or one for each expert.
    """
    op = "nvfp4"
    codes, stacked = _stack(op, "packed", packed)
    scales, _ = _stack(op, "scale", scale)
    sizes = check_tensors(op, {
        "packed": (codes, "E R B", (torch.uint8,)),
        "scale": (scales, "E R G", (torch.float8_e4m3fn,)),
        "global_scale": (global_scale.reshape(-1), "N", FLOATS),
    })  # fmt: skip
    if sizes["N"] not in (1, sizes["E"]):
        raise ValueError(f"[{op}] global_scale: expected 1 or E={sizes['E']} numbers, got {sizes['N']}")
    R, C = sizes["R"], 16 * sizes["G"]
    _expect(op, "packed", "8 bytes a scale", C // 2, sizes["B"])
    whole = global_scale.float().reshape(-1, 1, 1)
    product = scales.float() / whole if divide else scales.float() * whole
    return Quantised(codes, "e2m1", product, None, None, (1, 16), R, C, stacked)


def gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int = 4,
    version: int = 1,
    by_gptqmodel: bool = False,
) -> Quantised:
    """GPTQ with b of `BITS`: qweight int32 [.., C·b/32, R], qzeros int32 [.., G, ceil(R·b/32)], scales [.., G, R],
    g_idx int32 [.., C].

    Packed along the inputs C; without g_idx an input's group is c // (C / G). Version 1 (`checkpoint_format` gptq)
    stores zero points minus one, version 2 (gptq_v2) as they are. The one is put back by one addition to each 32-bit
    word, the inverse of how it is taken away, so a zero point of 0, which borrows from its neighbour, survives. Of 3
    bits, whose codes straddle words, it is put back code by code; GPTQModel took other numbers away from their words.
    """
    op = "gptq"
    _expect_bits(op, bits, BITS)
    if version not in (1, 2):
        raise ValueError(f"[{op}] version: expected 1 or 2, got {version}")
    words, stacked = _stack(op, "qweight", qweight)
    zeros, _ = _stack(op, "qzeros", qzeros)
    scale, _ = _stack(op, "scales", scales)
    group = g_idx if g_idx is None or g_idx.ndim > 1 else g_idx[None]
    sizes = check_tensors(op, {
        "qweight": (words, "E L R", (torch.int32,)),
        "scales": (scale, "E G R", FLOATS),
        "qzeros": (zeros, "E G Z", (torch.int32,)),
        "g_idx": (group, "E C", (torch.int32, torch.int64)),
    })  # fmt: skip
    C, R, G = 32 * sizes["L"] // bits, sizes["R"], sizes["G"]
    _expect(op, "qweight", f"words for {C} inputs", -(-C * bits // 32), sizes["L"])
    _expect(op, "qzeros", f"words for {R} outputs", -(-R * bits // 32), sizes["Z"])
    if group is not None:
        _expect(op, "g_idx", "one group an input", C, sizes["C"])
        _expect_groups(op, group, G)
    elif C and (G == 0 or C % G):
        raise ValueError(f"[{op}] scales: expected groups that divide {C} inputs, got {G}")
    zero = codes_in(zeros, bits, R)
    if version == 1:
        ones = ONES_OF_GPTQMODEL if by_gptqmodel and bits == 3 else ONES.get(bits)
        zero = codes_in(_plus(zeros, ones), bits, R) if ones else zero + 1
    zero = zero - (1 << bits - 1)
    block = (max(C // max(G, 1), 1), 1)
    group = None if group is None else group.int()
    return Quantised(_bytes(words), f"rows{bits}", scale, zero.float(), group, block, C, R, stacked, True)


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, bits: int = 4) -> Quantised:
    """AWQ (GEMM layout) with b of 4 or 8 bits: qweight int32 [.., C, R·b/32], qzeros int32 [.., G, R·b/32], scales
    [.., G, R].

    Packed along the outputs R, a word holding columns 0 2 4 6 1 3 5 7, of 8 bits 0 2 1 3, from its lowest bits up; a
    group is C/G inputs.
    """
    op = "awq"
    _expect_bits(op, bits, tuple(AWQ_PLACES))
    words, stacked = _stack(op, "qweight", qweight)
    zeros, _ = _stack(op, "qzeros", qzeros)
    scale, _ = _stack(op, "scales", scales)
    sizes = check_tensors(op, {
        "qweight": (words, "E C W", (torch.int32,)),
        "qzeros": (zeros, "E G W", (torch.int32,)),
        "scales": (scale, "E G R", FLOATS),
    })  # fmt: skip
    C, R, G = sizes["C"], 32 // bits * sizes["W"], sizes["G"]
    _expect(op, "scales", f"{32 // bits} outputs a word", R, sizes["R"])
    if C and (G == 0 or C % G):
        raise ValueError(f"[{op}] scales: expected groups that divide {C} inputs, got {G}")
    zero = codes_in(zeros, bits, R, AWQ_PLACES[bits]) - (1 << bits - 1)
    block = (max(C // max(G, 1), 1), 1)
    return Quantised(_bytes(words), f"awq{bits}", scale, zero.float(), None, block, C, R, stacked, True)


def pack_quantized(
    packed: Tensor, scale: Tensor, columns: int, zero_point: Tensor | None = None, *, bits: int = 4
) -> Quantised:
    """compressed-tensors' pack-quantized with b of `BITS`: packed int32 [.., R, ceil(C·b/32)], scale [.., R, G].

    Codes count from half of what they reach; `columns` is C, the last number of `weight_shape`. A group is C/G columns,
    G = 1 a scale for each row. zero_point int32 [.., ceil(R·b/32), G] is packed along the rows; None is symmetric.
    """
    op = "pack_quantized"
    _expect_bits(op, bits, BITS)
    words, stacked = _stack(op, "packed", packed)
    scales, _ = _stack(op, "scale", scale)
    zeros = None if zero_point is None else _stack(op, "zero_point", zero_point)[0]
    sizes = check_tensors(op, {
        "packed": (words, "E R W", (torch.int32,)),
        "scale": (scales, "E R G", FLOATS),
        "zero_point": (zeros, "E Z G", (torch.int32,)),
    })  # fmt: skip
    R, C, G = sizes["R"], columns, sizes["G"]
    _expect(op, "packed", f"words for {C} columns", -(-C * bits // 32), sizes["W"])
    if C and (G == 0 or C % G):
        raise ValueError(f"[{op}] scale: expected groups that divide {C} columns, got {G}")
    zero = None
    if zeros is not None:
        _expect(op, "zero_point", f"words for {R} rows", -(-R * bits // 32), sizes["Z"])
        zero = (codes_in(zeros.mT, bits, R).mT - (1 << bits - 1)).float().contiguous()
    block = (1, max(C // max(G, 1), 1))
    return Quantised(_bytes(words), f"packed{bits}", scales, zero, None, block, R, C, stacked)


def codes_in(words: Tensor, bits: int, numbers: int, places: Sequence[int] = ()) -> Tensor:
    """[.., W] -> [.., numbers] int64: codes in the lower 32 bits of words, one after another from the lowest of the
    first word up, or with places, where each of a word's lies."""
    index = torch.arange(numbers, device=words.device)
    if places:
        index = index // len(places) * len(places) + torch.tensor(places, device=words.device)[index % len(places)]
    word, shift = index * bits // 32, index * bits % 32
    positive = words.long() & 0xFFFFFFFF
    following = torch.nn.functional.pad(positive, (0, 1))[..., word + 1]
    return (positive[..., word] >> shift | following << 32 - shift) & (1 << bits) - 1


def _stack(op: str, name: str, tensor: Tensor) -> tuple[Tensor, bool]:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"[{op}] {name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.ndim not in (2, 3):
        raise ValueError(f"[{op}] {name}: expected 2 dimensions, or 3 for a stack of experts, got {list(tensor.shape)}")
    return (tensor, True) if tensor.ndim == 3 else (tensor[None], False)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.uint8)


def _scales(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == E8M0 else tensor


def _plus(words: Tensor, numbers: Sequence[int]) -> Tensor:
    """Words, to which the numbers are added in turn; 32 bits stay."""
    added = torch.tensor(numbers, device=words.device).repeat(-(-words.shape[-1] // len(numbers)))
    return words.long() + added[: words.shape[-1]]


def _expect_bits(op: str, bits: int, known: tuple[int, ...]) -> None:
    if bits not in known:
        raise ValueError(f"[{op}] bits: expected one of {', '.join(map(str, known))}, got {bits}")


def _expect(op: str, name: str, what: str, want: int, got: int) -> None:
    if want != got:
        raise ValueError(f"[{op}] {name}: expected {what}, {want}, got {got}")


def _expect_blocks(op: str, name: str, grid: tuple[int, int], sides: tuple[int, int], block: tuple[int, int]) -> None:
    if min(block) < 1:
        raise ValueError(f"[{op}] block: expected positive sizes, got {block}")
    want = tuple(-(-side // size) for side, size in zip(sides, block, strict=True))
    if grid != want:
        raise ValueError(f"[{op}] {name}: expected {want[0]} x {want[1]} blocks of {block}, got {grid[0]} x {grid[1]}")


def _expect_groups(op: str, group: Tensor, G: int) -> None:
    if group.numel() and (group.min() < 0 or group.max() >= G):
        raise ValueError(
            f"[{op}] g_idx: expected groups from 0 to {G - 1}, got {int(group.min())} to {int(group.max())}"
        )
