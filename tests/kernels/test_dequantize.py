"""Quantised layouts against one element at a time, and against the libraries that write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekern import _C, kernels
from moekern.kernels import native
from moekern.kernels.dequantize import dequantize
from moekern.kernels.quantised import Quantised, awq, gptq, mxfp4, nvfp4, pack_quantized, scaled
from tests.helpers.cases import float8
from tests.kernels.test_kernels import runs

BACKENDS = kernels.available()["dequantize"]["cpu"]
RUNS = [*runs("dequantize"), ("cpu", "reference")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP4 = [sign * v for sign in (1, -1) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator(seed), dtype=torch.int64).to(torch.int32)


def octets(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=generator(seed), dtype=torch.uint8)


def signed(*shape: int) -> Tensor:
    return octets(*shape).view(torch.int8)


def positive(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=generator(seed)) + 0.01


def nibble(word: Tensor, n: int) -> int:
    return (int(word) % 2**32) >> (4 * n) & 15


def each(R: int, C: int, element: Callable[[int, int], float]) -> Tensor:
    """The weight [R, C], element by element: float64 holds every product below exactly, float32 rounds it once."""
    values = [[element(r, c) for c in range(C)] for r in range(R)]
    return torch.tensor(values, dtype=torch.float64).view(R, C).float()


def fp8_case(R: int, C: int, dtype: torch.dtype, block: tuple[int, int]) -> tuple[Quantised, Tensor]:
    codes = octets(R, C)
    scale = positive(-(-R // block[0]), -(-C // block[1]))
    shape = (4, 3, 7, False) if dtype == torch.float8_e4m3fn else (5, 2, 15, True)
    want = each(R, C, lambda r, c: float8(int(codes[r, c]), *shape) * float(scale[r // block[0], c // block[1]]))
    return scaled(codes.view(dtype), scale, block), want


def int8_case(R: int, C: int) -> tuple[Quantised, Tensor]:
    codes, scale = octets(R, C).view(torch.int8), positive(R, 1)
    return scaled(codes, scale), each(R, C, lambda r, c: int(codes[r, c]) * float(scale[r, 0]))


def mxfp4_case(R: int, G: int) -> tuple[Quantised, Tensor]:
    blocks, scales = octets(R, G, 16), torch.randint(97, 157, (R, G), generator=generator(), dtype=torch.uint8)

    def element(r: int, c: int) -> float:
        byte = int(blocks[r, c // 32, c % 32 // 2])
        return FP4[byte >> 4 if c % 2 else byte & 15] * 2.0 ** (int(scales[r, c // 32]) - 127)

    return mxfp4(blocks, scales), each(R, 32 * G, element)


def nvfp4_case(R: int, G: int) -> tuple[Quantised, Tensor]:
    packed, scale, whole = octets(R, 8 * G), positive(R, G).to(torch.float8_e4m3fn), torch.tensor(0.0137)
    both = scale.float() * whole

    def element(r: int, c: int) -> float:
        byte = int(packed[r, c // 2])
        return FP4[byte >> 4 if c % 2 else byte & 15] * float(both[r, c // 16])

    return nvfp4(packed, scale, whole), each(R, 16 * G, element)


def gptq_case(R: int, C: int, G: int, version: int, order: bool) -> tuple[Quantised, Tensor]:
    qweight, qzeros, scales = words(C // 8, R), words(G, -(-R // 8), seed=2), positive(G, R).half()
    if version == 1:
        qzeros &= 0x77777777  # zero points below 8 are stored without a borrow
    g_idx = torch.randint(G, (C,), generator=generator(), dtype=torch.int32) if order else None

    def element(r: int, c: int) -> float:
        g = c // (C // G) if g_idx is None else int(g_idx[c])
        zero = nibble(qzeros[g, r // 8], r % 8) + (version == 1)
        return (nibble(qweight[c // 8, r], c % 8) - zero) * float(scales[g, r])

    return gptq(qweight, qzeros, scales, g_idx, version=version), each(R, C, element)


def awq_case(R: int, C: int, G: int) -> tuple[Quantised, Tensor]:
    qweight, qzeros, scales = words(C, R // 8), words(G, R // 8, seed=2), positive(G, R).half()

    def element(r: int, c: int) -> float:
        g, n = c // (C // G), AWQ_COLUMNS.index(r % 8)
        return (nibble(qweight[c, r // 8], n) - nibble(qzeros[g, r // 8], n)) * float(scales[g, r])

    return awq(qweight, qzeros, scales), each(R, C, element)


def packed_case(R: int, C: int, G: int, asymmetric: bool) -> tuple[Quantised, Tensor]:
    packed, scale, zeros = words(R, -(-C // 8)), positive(R, G).bfloat16(), words(-(-R // 8), G, seed=2)

    def element(r: int, c: int) -> float:
        g = c // (C // G)
        zero = nibble(zeros[r // 8, g], r % 8) if asymmetric else 8
        return (nibble(packed[r, c // 8], c % 8) - zero) * float(scale[r, g])

    return pack_quantized(packed, scale, C, zeros if asymmetric else None), each(R, C, element)


CASES: dict[str, Callable[[], tuple[Quantised, Tensor]]] = {
    "fp8": lambda: fp8_case(150, 133, torch.float8_e4m3fn, (128, 128)),
    "fp8-e5m2": lambda: fp8_case(9, 70, torch.float8_e5m2, (4, 33)),
    "fp8-columns": lambda: fp8_case(9, 70, torch.float8_e4m3fn, (9, 1)),
    "int8": lambda: int8_case(13, 77),
    "mxfp4": lambda: mxfp4_case(7, 3),
    "nvfp4": lambda: nvfp4_case(5, 3),
    "gptq": lambda: gptq_case(37, 64, 2, 1, False),
    "gptq-order": lambda: gptq_case(37, 64, 4, 1, True),
    "gptq-v2": lambda: gptq_case(16, 24, 3, 2, True),
    "awq": lambda: awq_case(40, 32, 2),
    "packed": lambda: packed_case(11, 90, 3, False),
    "packed-channel": lambda: packed_case(9, 37, 1, True),
    "packed-zero": lambda: packed_case(11, 64, 2, True),
}


def on(device: str, weight: Quantised) -> Quantised:
    tensors = {name: getattr(weight, name) for name in ("codes", "scale", "zero", "group")}
    return replace(weight, **{name: None if t is None else t.to(device) for name, t in tensors.items()})


def same(got: Tensor, want: Tensor) -> bool:
    return got.dtype == want.dtype and torch.equal(got.nan_to_num(1e30), want.nan_to_num(1e30))


@pytest.mark.parametrize(("device", "backend"), RUNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_layout_means_what_its_definition_says(case: str, dtype: torch.dtype, device: str, backend: str) -> None:
    weight, want = CASES[case]()
    assert weight.shape == want.shape
    got = dequantize(on(device, weight), dtype, backend=backend)
    assert got.is_contiguous()
    assert same(got.cpu(), want.to(dtype))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", CASES)
def test_bits_depend_on_neither_threads_nor_instruction_set(case: str) -> None:
    want = native.dequantize(weight := CASES[case]()[0], torch.bfloat16)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(same(native.dequantize(weight, torch.bfloat16, level=level), want) for level in _C.levels())


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_every_float8_code(device: str, backend: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        got = dequantize(on(device, scaled(codes.view(dtype), torch.ones(()))), torch.float32, backend=backend)
        assert same(got.cpu(), codes.view(dtype).float())


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_every_power_of_two(device: str, backend: str) -> None:
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    weight = mxfp4(torch.full((256, 1, 16), 0x72, dtype=torch.uint8), scales)
    got = dequantize(on(device, weight), torch.float32, backend=backend).cpu()
    power = torch.ldexp(torch.ones(256, 1, dtype=torch.float64), scales.double() - 127)
    want = (power * torch.tensor([1.0, 6.0] * 16).double()).float()  # 6 · 2^127 is infinite
    want[255] = torch.nan
    assert same(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stack_is_its_experts(backend: str) -> None:
    blocks, scales = octets(3, 5, 2, 16), torch.randint(120, 130, (3, 5, 2), generator=generator(), dtype=torch.uint8)
    qweight, qzeros, gscale = words(3, 4, 10), words(3, 2, 2, seed=3), positive(3, 2, 10).half()
    g_idx = torch.randint(2, (3, 32), generator=generator())
    pairs: list[tuple[Quantised, Callable[[int], Quantised]]] = [
        (mxfp4(blocks, scales), lambda e: mxfp4(blocks[e], scales[e])),
        (mxfp4(blocks.flatten(2), scales), lambda e: mxfp4(blocks[e], scales[e])),
        (gptq(qweight, qzeros, gscale, g_idx), lambda e: gptq(qweight[e], qzeros[e], gscale[e], g_idx[e])),
    ]
    for stack, one in pairs:
        whole = dequantize(stack, backend=backend)
        assert whole.shape == stack.shape
        for e in range(3):
            assert torch.equal(whole[e], dequantize(one(e), backend=backend))
            assert torch.equal(whole[e : e + 1], dequantize(stack.expert(e), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_every_shape(backend: str) -> None:
    codes = octets(2, 6, 10).view(torch.int8)
    one, two, rows = torch.tensor([0.3]), positive(2, 1, 1), positive(2, 6, 1).half()
    for scale in (one, two, rows):
        got = dequantize(scaled(codes, scale), torch.float32, backend=backend)
        assert torch.equal(got, codes.float() * scale.float())
    powers = torch.randint(120, 130, (6, 1), generator=generator(), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    got = dequantize(scaled(codes[0], powers, (1, 32)), torch.float32, backend=backend)
    assert torch.equal(got, codes[0].float() * powers.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("E", "R", "C"), [(0, 4, 32), (2, 0, 32), (2, 4, 0)])
def test_empty_weights(E: int, R: int, C: int, backend: str) -> None:
    empty = mxfp4(octets(E, R, C // 32, 16), octets(E, R, C // 32))
    assert dequantize(empty, backend=backend).shape == (E, R, C)


def test_gptq_version_1_keeps_a_zero_point_of_zero() -> None:
    """0 - 1 borrows from the next code of its word; the sum over the whole word gives both back."""
    zeros = torch.tensor([0, 5, 0, 0, 15, 8, 1, 0])
    word = sum(int(z) << 4 * n for n, z in enumerate(zeros))
    stored = torch.tensor([[(word - 0x11111111) % 2**32]]).to(torch.int32)
    as_is = torch.tensor([[word]]).to(torch.int32)
    args = words(1, 8), positive(1, 8)
    one, two = gptq(args[0], stored, args[1]), gptq(args[0], as_is, args[1], version=2)
    assert one.zero is not None
    assert one.zero.flatten().tolist() == (zeros - 8).tolist()
    assert torch.equal(dequantize(one), dequantize(two))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mxfp4_is_what_transformers_makes_of_it(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = octets(3, 10, 4, 16)
    scales = torch.randint(1, 253, (3, 10, 4), generator=generator(), dtype=torch.uint8)  # no overflow, no subnormal
    want = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(dequantize(mxfp4(blocks, scales), dtype).mT, want)  # transformers computes with the transpose


def test_fp8_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = octets(256, 384).bitwise_and(0x7E).view(torch.float8_e4m3fn), positive(2, 3)
    want = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert torch.equal(dequantize(scaled(weight, scale, (128, 128))), want)
    packed, powers = octets(8, 32).view(torch.int8), torch.randint(120, 130, (8, 2), dtype=torch.uint8)
    want = Fp8Dequantize(None)._dequantize_one(packed, powers.view(torch.float8_e8m0fnu), torch.bfloat16)
    assert torch.equal(dequantize(mxfp4(packed.view(torch.uint8), powers)), want)


def compressed(format: str, args: dict[str, Any], state: dict[str, Tensor]) -> Tensor:
    """compressed-tensors' own decompression of one module."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    return BaseCompressor.get_value_from_registry(format).decompress(state, scheme)["weight"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_quantized_is_what_compressed_tensors_makes_of_it(symmetric: bool, dtype: torch.dtype) -> None:
    packed, scale, zeros = words(24, 8), positive(24, 2).to(dtype), words(3, 2, seed=2)
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric}
    state = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([24, 64])}
    if not symmetric:
        state["weight_zero_point"] = zeros
    want = compressed("pack-quantized", args, state)
    assert torch.equal(dequantize(pack_quantized(packed, scale, 64, None if symmetric else zeros), dtype), want)


def test_nvfp4_is_what_compressed_tensors_makes_of_it() -> None:
    packed, scale, whole = octets(6, 24), positive(6, 3).to(torch.float8_e4m3fn), torch.tensor([37.0])
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    state = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole}
    want = compressed("nvfp4-pack-quantized", args, state)
    assert torch.equal(dequantize(nvfp4(packed, scale, whole, divide=True), want.dtype), want)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "fp8-grid": (
        lambda: scaled(octets(9, 9).view(torch.float8_e5m2), positive(2, 3), (8, 8)),
        r"\[scaled\] scale: expected 2 x 2 blocks of \(8, 8\), got 2 x 3",
    ),
    "fp8-dtype": (
        lambda: scaled(positive(2, 2), positive(1)),
        r"\[scaled\] weight: expected float8_e4m3fn or .*float32",
    ),
    "fp8-block": (
        lambda: scaled(signed(9, 9), positive(2, 2)),
        r"\[scaled\] block: expected a block size for scales of shape \[2, 2\], got None",
    ),
    "fp8-zero": (lambda: scaled(signed(2, 2), positive(1, 2), (0, 1)), r"\[scaled\] block: expected pos"),
    "fp8-float": (lambda: scaled(signed(2, 2), 1.0), r"\[scaled\] scale: expected a tensor, got float"),
    "fp8-vector": (lambda: scaled(signed(2, 2), positive(2)), r"\[scaled\] scale: expected 2 dimensions, or 3"),
    "strides": (lambda: scaled(signed(4, 8).T, positive(1)), r"\[scaled\] weight: expected a contiguous"),
    "mxfp4-scales": (lambda: mxfp4(octets(3, 2, 16), octets(3, 3)), r"\[mxfp4\] blocks: expected 16 bytes a scale, 48"),
    "mxfp4-dtype": (lambda: mxfp4(signed(3, 32), octets(3, 2)), r"\[mxfp4\] blocks: expected uint8"),
    "mxfp4-rows": (lambda: mxfp4(octets(3, 2, 16), octets(4, 2)), r"\[mxfp4\] scales: expected R=3, got 4"),
    "nvfp4": (
        lambda: nvfp4(octets(3, 8), positive(3, 1).to(torch.float8_e4m3fn), positive(2)),
        r"\[nvfp4\] global_scale: expected 1 or E=1 numbers, got 2",
    ),
    "gptq-version": (
        lambda: gptq(words(1, 8), words(1, 1), positive(1, 8), version=3),
        r"\[gptq\] version: expected 1 or 2",
    ),
    "gptq-zeros": (
        lambda: gptq(words(1, 9), words(1, 1), positive(1, 9)),
        r"\[gptq\] qzeros: expected a word for 8 outputs, 2",
    ),
    "gptq-groups": (
        lambda: gptq(words(1, 8), words(3, 1), positive(3, 8)),
        r"\[gptq\] scales: expected groups that divide 8",
    ),
    "gptq-index": (
        lambda: gptq(words(1, 8), words(2, 1), positive(2, 8), torch.tensor([0, 1, 2, 0, 0, 0, 0, 0])),
        r"\[gptq\] g_idx: expected groups from 0 to 1, got 0 to 2",
    ),
    "awq": (
        lambda: awq(words(8, 2), words(1, 2), positive(1, 8)),
        r"\[awq\] scales: expected 8 outputs a word, 16, got",
    ),
    "packed": (
        lambda: pack_quantized(words(3, 2), positive(3, 1), 17),
        r"\[pack_quantized\] packed: expected a word for 8 columns, 3, got 2",
    ),
    "packed-zero": (
        lambda: pack_quantized(words(9, 2), positive(9, 1), 16, words(1, 1)),
        r"\[pack_quantized\] zero_point: expected a word for 8 rows, 2, got 1",
    ),
    "not-quantised": (lambda: dequantize(positive(2, 2)), r"\[dequantize\] weight: expected a Quantised, got Tensor"),
    "out": (
        lambda: dequantize(mxfp4_case(1, 1)[0], torch.float64),
        r"\[dequantize\] dtype: expected float32 or .*float64",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_the_wrong_argument_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        call()


GOOD = gptq_case(16, 64, 4, 1, True)[0]


@given(st.integers(-(2**31), 2**31 - 1), st.integers(0, 63))
def test_the_extension_refuses_a_group_without_scales(value: int, at: int) -> None:
    assert GOOD.group is not None
    group = GOOD.group.clone()
    group[0, at] = value
    if 0 <= value < 4:
        return
    with pytest.raises(ValueError, match=rf"\[dequantize\] group: expected values from 0 to 3, got {value}"):
        native.dequantize(replace(GOOD, group=group), torch.float32)


@given(
    rows=st.integers(-3, 80), columns=st.integers(-3, 40), block=st.tuples(st.integers(-1, 70), st.integers(-1, 70)),
    coding=st.sampled_from(["e4m3", "e2m1", "int4_rows", "int5"]),
)  # fmt: skip
def test_the_extension_refuses_sizes_that_do_not_fit(
    rows: int, columns: int, block: tuple[int, int], coding: str
) -> None:
    weight = replace(GOOD, rows=rows, columns=columns, block=block, coding=coding, group=None)
    fits = (rows, columns, coding, *(-(-n // max(b, 1)) for n, b in zip((rows, columns), block, strict=True)))
    if fits == (64, 16, "int4_rows", 4, 16) and min(block) > 0:
        return
    with pytest.raises((ValueError, RuntimeError), match=r"\[dequantize\] |negative dimension"):
        native.dequantize(weight, torch.float32)
