// Plain loops over a fixed number of lanes, compiled once per instruction set and chosen at run time. The order of every
// sum is written in the source and contraction is off, so all instruction sets give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "../kernels.h"

#define MOEKERN_INLINE inline __attribute__((always_inline))

namespace moekern::cpu {

// 32 floats fill two AVX-512 or four AVX2 registers, enough to hide the latency of an add.
constexpr int kLanes = 32;

enum class Level { baseline, v3, v4 };
Level level_of(const std::string& name);  // "" is the widest this machine has

#if defined(__x86_64__) && defined(__GNUC__)
template <class Body>
__attribute__((target("avx2,bmi,bmi2,lzcnt,movbe"))) void run_v3(const Body& body) {
  body();
}
template <class Body>
__attribute__((target("avx2,bmi,bmi2,lzcnt,movbe,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))) void run_v4(
    const Body& body) {
  body();
}
#endif

// The body must be an always-inline lambda that calls only MOEKERN_INLINE functions in its loops: what is inlined here
// is compiled for the level, what is not stays at the baseline.
template <class Body>
void at_level(Level level, const Body& body) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level == Level::v4) return run_v4(body);
  if (level == Level::v3) return run_v3(body);
#endif
  body();
}

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

MOEKERN_INLINE float load(float v) { return v; }
MOEKERN_INLINE float load(bfloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
// Exact for every value, subnormals, infinities and NaN included, and without the F16C instructions.
MOEKERN_INLINE float load(float16 v) {
  const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  const uint32_t twice = wide + wide;
  const float normal = bit_cast<float>((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float subnormal = bit_cast<float>((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = twice < (1u << 27) ? bit_cast<uint32_t>(subnormal) : bit_cast<uint32_t>(normal);
  return bit_cast<float>((wide & 0x80000000u) | magnitude);
}

// To the nearest, ties to even.
MOEKERN_INLINE void store(float v, float* to) { *to = v; }
MOEKERN_INLINE void store(float v, bfloat16* to) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(v == v ? rounded : 0x7FC0u);
}
MOEKERN_INLINE void store(float v, float16* to) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7C00u : half;
  half = v == v ? half : 0x7E00u;
  to->bits = static_cast<uint16_t>(sign | half);
}

MOEKERN_INLINE float larger(float a, float b) { return b > a ? b : a; }

MOEKERN_INLINE float sum_of(float* lane) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

MOEKERN_INLINE float max_of(float* lane) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane[j] = larger(lane[j], lane[j + width]);
  return lane[0];
}

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

}  // namespace moekern::cpu
