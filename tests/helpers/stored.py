"""Quantised layouts of random codes beside what they stand for, one element at a time, and checks of every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moekern.kernels.dequantize import dequantize
from moekern.kernels.quantised import Quantised, awq, gptq, mxfp4, nvfp4, pack_quantized, scaled
from tests.helpers.cases import float8

FP4 = [sign * v for sign in (1, -1) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
AWQ_COLUMNS = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}


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


def code(words: Tensor, bits: int, n: int) -> int:
    """The n-th of codes that lie one after another in a vector of words."""
    word, shift = divmod(bits * n, 32)
    two = sum(int(value) % 2**32 << 32 * i for i, value in enumerate(words[word : word + (2 if 32 % bits else 1)]))
    return two >> shift & (1 << bits) - 1


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


def gptq_case(R: int, C: int, G: int, version: int, order: bool, bits: int = 4) -> tuple[Quantised, Tensor]:
    qweight, qzeros, scales = words(C * bits // 32, R), words(G, -(-R * bits // 32), seed=2), positive(G, R).half()
    if version == 1 and bits != 3:
        qzeros &= {2: 0x55555555, 4: 0x77777777, 8: 0x7F7F7F7F}[bits]  # none that one more would carry out of
    g_idx = torch.randint(G, (C,), generator=generator(), dtype=torch.int32) if order else None

    def element(r: int, c: int) -> float:
        g = c // (C // G) if g_idx is None else int(g_idx[c])
        zero = code(qzeros[g], bits, r) + (version == 1)
        return (code(qweight[:, r], bits, c) - zero) * float(scales[g, r])

    return gptq(qweight, qzeros, scales, g_idx, bits=bits, version=version), each(R, C, element)


def awq_case(R: int, C: int, G: int, bits: int = 4) -> tuple[Quantised, Tensor]:
    a_word = 32 // bits
    qweight, qzeros, scales = words(C, R // a_word), words(G, R // a_word, seed=2), positive(G, R).half()

    def element(r: int, c: int) -> float:
        g, n = c // (C // G), r // a_word * a_word + AWQ_COLUMNS[bits].index(r % a_word)
        return (code(qweight[c], bits, n) - code(qzeros[g], bits, n)) * float(scales[g, r])

    return awq(qweight, qzeros, scales, bits=bits), each(R, C, element)


def packed_case(R: int, C: int, G: int, asymmetric: bool, bits: int = 4) -> tuple[Quantised, Tensor]:
    packed, scale = words(R, -(-C * bits // 32)), positive(R, G).bfloat16()
    zeros = words(-(-R * bits // 32), G, seed=2)

    def element(r: int, c: int) -> float:
        g = c // (C // G)
        zero = code(zeros[:, g], bits, r) if asymmetric else 1 << bits - 1
        return (code(packed[r], bits, c) - zero) * float(scale[r, g])

    return pack_quantized(packed, scale, C, zeros if asymmetric else None, bits=bits), each(R, C, element)


def int8_zero_case(R: int, C: int) -> tuple[Quantised, Tensor]:
    codes, scale, zero = octets(R, C).view(torch.int8), positive(R, 1), octets(R, 1, seed=2).view(torch.int8)
    want = each(R, C, lambda r, c: (int(codes[r, c]) - int(zero[r, 0])) * float(scale[r, 0]))
    return scaled(codes, scale, zero=zero), want


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
    "int8-zero": lambda: int8_zero_case(5, 41),
    "gptq-2": lambda: gptq_case(21, 32, 2, 1, False, bits=2),
    "gptq-3": lambda: gptq_case(37, 64, 4, 1, True, bits=3),
    "gptq-3-v2": lambda: gptq_case(35, 32, 1, 2, False, bits=3),
    "gptq-8": lambda: gptq_case(37, 36, 4, 1, True, bits=8),
    "awq-8": lambda: awq_case(20, 32, 2, bits=8),
    "packed-2": lambda: packed_case(9, 37, 1, False, bits=2),
    "packed-3": lambda: packed_case(11, 45, 3, True, bits=3),
    "packed-8": lambda: packed_case(7, 42, 2, True, bits=8),
}


def on(device: str, weight: Quantised) -> Quantised:
    tensors = {name: getattr(weight, name) for name in ("codes", "scale", "zero", "group")}
    return replace(weight, **{name: None if t is None else t.to(device) for name, t in tensors.items()})


def same(got: Tensor, want: Tensor) -> bool:
    return got.dtype == want.dtype and torch.equal(got.nan_to_num(1e30), want.nan_to_num(1e30))


GOOD = gptq_case(16, 64, 4, 1, True)[0]


def assert_defined(case: str, dtype: torch.dtype, device: str, backend: str) -> None:
    weight, want = CASES[case]()
    assert weight.shape == want.shape
    got = dequantize(on(device, weight), dtype, backend=backend)
    assert got.is_contiguous()
    assert same(got.cpu(), want.to(dtype))


def assert_every_float8_code(device: str, backend: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        got = dequantize(on(device, scaled(codes.view(dtype), torch.ones(()))), torch.float32, backend=backend)
        assert same(got.cpu(), codes.view(dtype).float())


def assert_every_power_of_two(device: str, backend: str) -> None:
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    weight = mxfp4(torch.full((256, 1, 16), 0x72, dtype=torch.uint8), scales)
    got = dequantize(on(device, weight), torch.float32, backend=backend).cpu()
    power = torch.ldexp(torch.ones(256, 1, dtype=torch.float64), scales.double() - 127)
    want = (power * torch.tensor([1.0, 6.0] * 16).double()).float()  # 6 · 2^127 is infinite
    want[255] = torch.nan
    assert same(got, want)


def assert_a_stack_is_its_experts(backend: str) -> None:
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


def assert_scales_of_every_shape(backend: str) -> None:
    codes = octets(2, 6, 10).view(torch.int8)
    one, two, rows = torch.tensor([0.3]), positive(2, 1, 1), positive(2, 6, 1).half()
    for scale in (one, two, rows):
        got = dequantize(scaled(codes, scale), torch.float32, backend=backend)
        assert torch.equal(got, codes.float() * scale.float())
    powers = torch.randint(120, 130, (6, 1), generator=generator(), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    got = dequantize(scaled(codes[0], powers, (1, 32)), torch.float32, backend=backend)
    assert torch.equal(got, codes[0].float() * powers.float())


def assert_empty(E: int, R: int, C: int, backend: str) -> None:
    empty = mxfp4(octets(E, R, C // 32, 16), octets(E, R, C // 32))
    assert dequantize(empty, backend=backend).shape == (E, R, C)
