"""Exponential, logarithm and rounding of float32, operation by operation those of csrc/floats.h.

A GPU's own are approximations that differ from chip to chip, and ln near 1 has no correct digit.
"""

import triton
import triton.language as tl


@triton.jit
def exponential(x):
    """exp(x) for -87 <= x <= 88, to 1 ulp or so: the range reduced by n ln 2 in two exact steps, then a polynomial."""
    # 1.5 * 2^23: adding it leaves the nearest integer in the low bits.
    shifted = x * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    scale = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return ((p * r) * r + r + 1.0) * scale


@triton.jit
def logarithm(x):
    """ln(x) for normal x > 0; finite for 0. x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), a polynomial in f."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    e = exponent.to(tl.float32)
    f = (bits - exponent * 0x800000).to(tl.float32, bitcast=True) - 1.0
    p = f * 7.0376836292e-2 + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    z = f * f
    tail = ((p * f) * z + e * -2.12194440e-4) - z * 0.5
    return (f + tail) + e * 0.693359375


@triton.jit
def logarithm_of_one_plus(u):
    """ln(1 + u) for 0 <= u <= 1, accurate for small u too: what rounding 1 + u lost is put back as a ratio."""
    w = u + 1.0
    lost = w == 1.0
    ratio = tl.div_rn(u, tl.where(lost, 1.0, w - 1.0))
    return tl.where(lost, u, logarithm(w) * ratio)


@triton.jit
def rounded_to_bfloat16(x):
    """The float32 that is nearest to x among bfloat16's, ties to even: Triton's interpreter cuts bits off instead."""
    bits = tl.where(x == x, x, 0.0).to(tl.int32, bitcast=True)
    near = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16) << 16
    return tl.where(x == x, near.to(tl.float32, bitcast=True), x)
