// Halves, and functions of one float that CPUs and GPUs must round alike: plain operations in a fixed order, compiled
// without contraction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MOEKERN_INLINE __host__ __device__ __forceinline__
#else
#define MOEKERN_INLINE inline __attribute__((always_inline))
#endif

namespace moekern {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
MOEKERN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Conversions of one number (F float, U uint32_t) or of eight (F Floats, U Words).
// Widening takes the half's bits in the upper 16 and zeros below. Exact for every value, subnormals, infinities and NaN
// included, and without the F16C instructions.
template <class F, class U>
MOEKERN_INLINE F widened(U wide, bfloat16) {
  return bit_cast<F>(wide);
}
template <class F, class U>
MOEKERN_INLINE F widened(U wide, float16) {
  const U twice = wide + wide;
  const F normal = bit_cast<F>((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const F subnormal = bit_cast<F>((twice >> 17) | (126u << 23)) - 0.5f;
  const U magnitude = twice < (1u << 27) ? bit_cast<U>(subnormal) : bit_cast<U>(normal);
  return bit_cast<F>((wide & 0x80000000u) | magnitude);
}

// To the nearest, ties to even: the half's bits in the lower 16.
template <class U, class F>
MOEKERN_INLINE U narrowed(F v, bfloat16) {
  const U bits = bit_cast<U>(v);
  const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : U{} + 0x7FC0u;
}
template <class U, class F>
MOEKERN_INLINE U narrowed(F v, float16) {
  const U bits = bit_cast<U>(v);
  const U sign = (bits >> 16) & 0x8000u;
  const U magnitude = bits & 0x7FFFFFFFu;
  const U normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - (126u << 23);
  U half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? U{} + 0x7C00u : half;
  half = v == v ? half : U{} + 0x7E00u;
  return sign | half;
}

MOEKERN_INLINE float load(float v) { return v; }
template <class Half>
MOEKERN_INLINE float load(Half v) {
  return widened<float>(static_cast<uint32_t>(v.bits) << 16, v);
}

MOEKERN_INLINE void store(float v, float* to) { *to = v; }
template <class Half>
MOEKERN_INLINE void store(float v, Half* to) {
  to->bits = static_cast<uint16_t>(narrowed<uint32_t>(v, Half{}));
}

MOEKERN_INLINE float larger(float a, float b) { return b > a ? b : a; }

// exp(x) for -87 <= x <= 88. Range reduced by n ln 2 in two exact steps, then a polynomial on |r| <= ln 2 / 2.
// Unlike libm's, the same operations on every instruction set.
MOEKERN_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float scale = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + (127u << 23));
  return ((p * r) * r + r + 1.0f) * scale;
}

// ln(x) for normal x > 0; finite for 0. x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), then a polynomial in f.
MOEKERN_INLINE float logarithm(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float e = static_cast<float>(exponent);
  const float f = bit_cast<float>(bits - exponent * (1 << 23)) - 1.0f;
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float tail = (p * f) * z + e * -2.12194440e-4f - 0.5f * z;
  return (f + tail) + e * 0.693359375f;
}

// ln(1 + u) for 0 <= u <= 1, accurate for small u too: what rounding 1 + u lost is put back as a ratio.
MOEKERN_INLINE float logarithm_of_one_plus(float u) {
  const float w = 1.0f + u;
  return w == 1.0f ? u : logarithm(w) * (u / (w - 1.0f));
}

}  // namespace moekern
