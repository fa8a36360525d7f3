"""The experts' MLP: two grouped products over tiles of one expert's rows, the first gathers, the second measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekern.kernels.quantised import Quantised
from moekern.kernels.triton.chunks import Chunks, chunks_of, rows_of
from moekern.kernels.triton.combine_and_measure import combine_and_measure, store_part
from moekern.kernels.triton.floats import rounded_to_bfloat16

if TYPE_CHECKING:
    from moekern.kernels.sums import ExpertSums

# Triton's interpreter cuts bits off where it makes a bfloat16, and multiplies matrices of them as integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
GROUP = 8  # tiles of rows that are multiplied with the same weights before the next columns: they stay in the L2 cache


class Tiles(NamedTuple):
    """What a program computes: rows x columns (of gate and of up, or of y), `depth` elements of each sum at a time."""

    rows: int
    gate_up: int  # columns
    down: int  # columns
    depth: int
    warps: int
    stages: int  # loads in flight


# What fits into registers and shared memory, by arithmetic: none of this was tuned, since it has not run on a GPU.
BIG = Tiles(128, 128, 256, 64, 8, 3)  # up to 147 KB
SMALL = Tiles(128, 64, 128, 64, 8, 3)  # up to 98 KB
FLOAT32 = Tiles(64, 32, 64, 32, 4, 3)  # without tensor cores, which would cut its digits off
BIG_SHARED_MEMORY = (9, 10)  # major compute capabilities with 227 KB; others have 99 KB at least


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 rounded to the nearest of dtype."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = rounded_to_bfloat16(x)
    return x.to(dtype)


@triton.jit
def added(sum, a, w):
    """sum + a w^T, for a [rows, depth] and w [columns, depth]."""
    if INTERPRETED:
        a = a.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(a, tl.trans(w), sum, input_precision="ieee")


@triton.jit
def e4m3(code):
    """The float32 that a byte stands for; 0x7F and 0xFF are NaN. As an integer, since chips before 8.9 know no FP8."""
    bits = code.to(tl.int8, bitcast=True).to(tl.int32) << 20  # the sign in bits 27 to 31
    magnitude = bits & 0x07F00000
    # As a float32 this is 2^120 too small, subnormal ones too: the difference of the exponents' biases.
    value = (bits & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(magnitude == 0x07F00000, float("nan"), value)


@triton.jit
def scale_of(scale_ptr, at, there):
    if scale_ptr.dtype.element_ty == tl.uint8:  # 2^(code - 127), NaN for 255
        code = tl.load(scale_ptr + at, mask=there, other=0).to(tl.int32)
        bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
        scale = bits.to(tl.float32, bitcast=True)
    else:
        scale = tl.load(scale_ptr + at, mask=there, other=0.0).to(tl.float32)
    return scale


@triton.jit
def weights(
    w_ptr, scale_ptr, e, r, inside, k, R, C,
    dtype: tl.constexpr, SCALE_R: tl.constexpr, SCALE_C: tl.constexpr, ONE_SCALE: tl.constexpr,
):  # fmt: skip
    """Rows r and columns k of expert e's matrix [R, C] in dtype, 0 outside; FP8 as value x scale, rounded."""
    there = inside[:, None] & (k < C)[None, :]
    w = tl.load(w_ptr + (e * R + r)[:, None] * C + k[None, :], mask=there, other=0)
    if scale_ptr is not None:
        row = (e * tl.cdiv(R, SCALE_R) + r // SCALE_R) * tl.cdiv(C, SCALE_C)
        if ONE_SCALE:  # for all of these columns
            scale = scale_of(scale_ptr, row + tl.min(k, 0) // SCALE_C, inside)[:, None]
        else:
            scale = scale_of(scale_ptr, row[:, None] + (k // SCALE_C)[None, :], there)
        w = narrowed(e4m3(w) * scale, dtype)
    return w


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # (1 + tanh z) / 2 = 1 / (1 + exp -2z)
        tl.static_assert(ACTIVATION == "gelu_pytorch_tanh")
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return y


@triton.jit
def place(tiles, columns, GROUP: tl.constexpr):
    """This program's tile of rows and its tile of columns: GROUP tiles of rows go through all columns together."""
    group = tl.program_id(0) // (GROUP * columns)
    within = tl.program_id(0) % (GROUP * columns)
    rows = tl.minimum(tiles - group * GROUP, GROUP)
    return group * GROUP + within % rows, within // rows


@triton.jit(do_not_specialize=["slots", "tiles"])
def gate_up_kernel(
    x_ptr, w_ptr, scale_ptr, order_ptr, offsets_ptr, first_ptr, inner_ptr, slots, tiles, H, width, E,
    K: tl.constexpr, ACTIVATION: tl.constexpr, SCALE_R: tl.constexpr, SCALE_C: tl.constexpr, ONE_SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """inner = act(gate(x)) up(x) [N, width] for some rows of one expert, gathered from x by order, and some columns."""
    tile, column = place(tiles, tl.cdiv(width, COLUMNS), GROUP)
    e, start, stop = rows_of(tile, offsets_ptr, first_ptr, E, ROWS, BLOCK_E)
    if e < E:
        dtype = x_ptr.dtype.element_ty
        n = start + tl.arange(0, ROWS)
        slot = tl.load(order_ptr + n, mask=n < stop, other=-1)
        filled = (slot >= 0) & (slot < slots)
        row = tl.where(filled, slot, 0) // K * H
        i = column * COLUMNS + tl.arange(0, COLUMNS)
        inside = i < width
        of = e.to(tl.int64)
        gate = tl.full((ROWS, COLUMNS), 0, tl.float32)
        up = tl.full((ROWS, COLUMNS), 0, tl.float32)
        for at in range(0, H, DEPTH):
            h = at + tl.arange(0, DEPTH)
            x = tl.load(x_ptr + row[:, None] + h[None, :], mask=filled[:, None] & (h < H)[None, :], other=0.0)
            w = weights(w_ptr, scale_ptr, of, i, inside, h, 2 * width, H, dtype, SCALE_R, SCALE_C, ONE_SCALE)
            gate = added(gate, x, w)
            w = weights(w_ptr, scale_ptr, of, i + width, inside, h, 2 * width, H, dtype, SCALE_R, SCALE_C, ONE_SCALE)
            up = added(up, x, w)
        act = narrowed(activated(narrowed(gate, dtype).to(tl.float32), ACTIVATION), dtype).to(tl.float32)
        inner = narrowed(act * narrowed(up, dtype).to(tl.float32), dtype)
        tl.store(inner_ptr + n[:, None] * width + i[None, :], inner, mask=(n < stop)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tiles"])
def down_kernel(
    inner_ptr, w_ptr, scale_ptr, offsets_ptr, first_ptr, y_ptr, square_ptr, top_ptr, tiles, H, width, E,
    SCALE_R: tl.constexpr, SCALE_C: tl.constexpr, ONE_SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y = down(inner) for some rows of one expert and some columns, and this part of y's squares and largest."""
    parts = tl.cdiv(H, COLUMNS)
    tile, column = place(tiles, parts, GROUP)
    e, start, stop = rows_of(tile, offsets_ptr, first_ptr, E, ROWS, BLOCK_E)
    if e < E:
        dtype = inner_ptr.dtype.element_ty
        n = start + tl.arange(0, ROWS)
        filled = n < stop
        h = column * COLUMNS + tl.arange(0, COLUMNS)
        inside = h < H
        of = e.to(tl.int64)
        sum = tl.full((ROWS, COLUMNS), 0, tl.float32)
        for at in range(0, width, DEPTH):
            i = at + tl.arange(0, DEPTH)
            there = filled[:, None] & (i < width)[None, :]
            inner = tl.load(inner_ptr + n[:, None] * width + i[None, :], mask=there, other=0.0)
            w = weights(w_ptr, scale_ptr, of, h, inside, i, H, width, dtype, SCALE_R, SCALE_C, ONE_SCALE)
            sum = added(sum, inner, w)
        y = narrowed(sum, dtype)
        tl.store(y_ptr + n[:, None] * H + h[None, :], y, mask=filled[:, None] & inside[None, :])
        if square_ptr is not None:
            # An infinity times a weight that is not there is NaN.
            y = tl.where(inside[None, :], y.to(tl.float32), 0.0)
            store_part(y, square_ptr, top_ptr, n * parts + column, filled)


def grouped_mlp(
    x: Tensor, gate_up: Tensor | Quantised, down: Tensor | Quantised, topk_weight: Tensor, topk_idx: Tensor,
    order: Tensor, offsets: Tensor, mask: Tensor | None, residual: Tensor | None, sums: ExpertSums | None, *,
    activation: str,
) -> Tensor:  # fmt: skip
    y, parts = expert_outputs(x, gate_up, down, topk_idx, order, offsets, activation, measure=sums is not None)
    return combine_and_measure(y, topk_weight, topk_idx, order, offsets, mask, residual, sums, parts=parts)


def expert_outputs(
    x: Tensor, gate_up: Tensor | Quantised, down: Tensor | Quantised, topk_idx: Tensor, order: Tensor, offsets: Tensor,
    activation: str, *, measure: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """y [N, H], and the parts [N, tiles] of each row's squares and largest magnitude; nothing from offsets[E] on."""
    N, H, width = len(order), x.shape[1], down.shape[-1]
    use = tiles_for(x, N, len(offsets) - 1)
    chunks = chunks_of(offsets, N, use.rows)
    inner, y = x.new_empty(N, width), x.new_empty(N, H)
    columns = triton.cdiv(H, use.down)
    square = y.new_empty(N, columns, dtype=torch.float32) if measure else None
    top = y.new_empty(N, columns, dtype=torch.int32) if measure else None
    if topk_idx.numel():
        gate_up_kernel[(chunks.limit * triton.cdiv(width, use.gate_up),)](
            x, *stored(gate_up), order, chunks.offsets, chunks.first, inner, topk_idx.numel(), chunks.limit, H, width,
            chunks.num_experts, K=topk_idx.shape[1], ACTIVATION=activation, COLUMNS=use.gate_up,
            **common(gate_up, use, chunks),
        )  # fmt: skip
        down_kernel[(chunks.limit * columns,)](
            inner, *stored(down), chunks.offsets, chunks.first, y, square, top, chunks.limit, H, width,
            chunks.num_experts, COLUMNS=use.down, **common(down, use, chunks),
        )  # fmt: skip
    return y, None if square is None or top is None else (square, top)


def tiles_for(x: Tensor, N: int, E: int) -> Tiles:
    """By dtype and chip; fewer rows where experts have few on the average."""
    major = torch.cuda.get_device_capability(x.device)[0] if x.device.type == "cuda" else 0
    use = FLOAT32 if x.dtype == torch.float32 else BIG if major in BIG_SHARED_MEMORY else SMALL
    return use._replace(rows=min(use.rows, max(16, triton.next_power_of_2(triton.cdiv(N, max(E, 1))))))


def stored(weight: Tensor | Quantised) -> tuple[Tensor, Tensor | None]:
    return (weight, None) if isinstance(weight, Tensor) else (weight.codes, weight.scale)


def common(weight: Tensor | Quantised, use: Tiles, chunks: Chunks) -> dict[str, Any]:
    """Arguments that both kernels have."""
    rows, columns = (1, 1) if isinstance(weight, Tensor) else weight.block
    one = columns % use.depth == 0 or columns >= weight.shape[-1]
    return {
        "SCALE_R": rows, "SCALE_C": columns, "ONE_SCALE": one, "ROWS": use.rows, "DEPTH": use.depth,
        "GROUP": GROUP, "BLOCK_E": chunks.block, "num_warps": use.warps, "num_stages": use.stages,
        "enable_fp_fusion": False,
    }  # fmt: skip
