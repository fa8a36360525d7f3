"""Quantised layouts against one element at a time, and against the libraries that write them."""

from __future__ import annotations

from collections.abc import Callable
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
from moekern.kernels.quantised import awq, gptq, mxfp4, nvfp4, pack_quantized, scaled
from tests.helpers.ops import DTYPES, runs
from tests.helpers.stored import (
    CASES,
    GOOD,
    assert_a_stack_is_its_experts,
    assert_defined,
    assert_empty,
    assert_every_float8_code,
    assert_every_power_of_two,
    assert_scales_of_every_shape,
    generator,
    mxfp4_case,
    octets,
    positive,
    same,
    signed,
    words,
)

BACKENDS = kernels.available()["dequantize"]["cpu"]
RUNS = [*runs("dequantize"), ("cpu", "reference")]


@pytest.mark.parametrize(("device", "backend"), RUNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_layout_means_what_its_definition_says(case: str, dtype: torch.dtype, device: str, backend: str) -> None:
    assert_defined(case, dtype, device, backend)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", CASES)
def test_bits_depend_on_neither_threads_nor_instruction_set(case: str) -> None:
    want = native.dequantize(weight := CASES[case]()[0], torch.bfloat16)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(same(native.dequantize(weight, torch.bfloat16, level=level), want) for level in _C.levels())


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_every_float8_code(device: str, backend: str) -> None:
    assert_every_float8_code(device, backend)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_every_power_of_two(device: str, backend: str) -> None:
    assert_every_power_of_two(device, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stack_is_its_experts(backend: str) -> None:
    assert_a_stack_is_its_experts(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_every_shape(backend: str) -> None:
    assert_scales_of_every_shape(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("E", "R", "C"), [(0, 4, 32), (2, 0, 32), (2, 4, 0)])
def test_empty_weights(E: int, R: int, C: int, backend: str) -> None:
    assert_empty(E, R, C, backend)


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
        r"\[gptq\] qzeros: expected words for 9 outputs, 2",
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
        r"\[pack_quantized\] packed: expected words for 17 columns, 3, got 2",
    ),
    "packed-zero": (
        lambda: pack_quantized(words(9, 2), positive(9, 1), 16, words(1, 1)),
        r"\[pack_quantized\] zero_point: expected words for 9 rows, 2, got 1",
    ),
    "bits": (
        lambda: gptq(words(5, 8), words(1, 2), positive(1, 8), bits=5),
        r"\[gptq\] bits: expected one of 2, 3, 4, 8, got 5",
    ),
    "awq-bits": (
        lambda: awq(words(8, 1), words(1, 1), positive(1, 8), bits=3),
        r"\[awq\] bits: expected one of 4, 8, got 3",
    ),
    "zero": (
        lambda: scaled(signed(4, 4), positive(4, 1), zero=positive(3)),
        r"\[scaled\] zero: expected as many as scales, 4, got 3",
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
    coding=st.sampled_from(["e4m3", "e2m1", "packed3", "rows4", "rows8", "int5"]),
)  # fmt: skip
def test_the_extension_refuses_sizes_that_do_not_fit(
    rows: int, columns: int, block: tuple[int, int], coding: str
) -> None:
    weight = replace(GOOD, rows=rows, columns=columns, block=block, coding=coding, group=None)
    fits = (rows, columns, coding, *(-(-n // max(b, 1)) for n, b in zip((rows, columns), block, strict=True)))
    if fits == (64, 16, "rows4", 4, 16) and min(block) > 0:
        return
    with pytest.raises((ValueError, RuntimeError), match=r"\[dequantize\] |negative dimension"):
        native.dequantize(weight, torch.float32)
