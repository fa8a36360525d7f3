// Plain loops over a fixed number of lanes, compiled once per instruction set and chosen at run time. The order of every
// sum is written in the source and contraction is off, so all instruction sets give the same bits.
#pragma once

#include <algorithm>
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

// Eight lanes, for loops that compilers do not vectorise well. One AVX register; elsewhere the compiler splits it.
// Aligned to 16 at every level: GCC's own choice depends on the level, and memory is shared between levels.
constexpr int kVector = 8;
typedef float Floats __attribute__((vector_size(4 * kVector), aligned(16)));
typedef uint32_t Words __attribute__((vector_size(4 * kVector), aligned(16)));
typedef int32_t Ints __attribute__((vector_size(4 * kVector), aligned(16)));
typedef int16_t Shorts __attribute__((vector_size(4 * kVector), aligned(16)));

template <class V>
MOEKERN_INLINE V read(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
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

// 16 columns in two vectors. Halves come two to a word: the even columns of the words go to a, the odd ones to b, so
// that nothing moves between lanes. Floats stay in order.
MOEKERN_INLINE void unpack(const float* from, Floats& a, Floats& b) {
  a = read<Floats>(from);
  b = read<Floats>(from + kVector);
}
template <class Half>
MOEKERN_INLINE void unpack(const Half* from, Floats& a, Floats& b) {
  const Words words = read<Words>(from);
  a = widened<Floats>(words << 16, Half{});
  b = widened<Floats>(words & 0xFFFF0000u, Half{});
}

MOEKERN_INLINE void pack(const Floats& a, const Floats& b, float* to) {
  std::memcpy(to, &a, sizeof a);
  std::memcpy(to + kVector, &b, sizeof b);
}
template <class Half>
MOEKERN_INLINE void pack(const Floats& a, const Floats& b, Half* to) {
  const Words words = narrowed<Words>(a, Half{}) | narrowed<Words>(b, Half{}) << 16;
  std::memcpy(to, &words, sizeof words);
}

// 16 unpacked columns in their own order again.
MOEKERN_INLINE void in_order(const Floats& a, const Floats& b, float* to, const float*) { pack(a, b, to); }
template <class Half>
MOEKERN_INLINE void in_order(const Floats& a, const Floats& b, float* to, const Half*) {
  for (int j = 0; j < kVector; ++j) {
    to[2 * j] = a[j];
    to[2 * j + 1] = b[j];
  }
}

// Largest magnitudes of 16 columns, as integers: bits of non-negative numbers are ordered like integers, with NaN above
// all, so no NaN is lost and no comparison needs care.
template <class T>
struct Top {
  Shorts top = {};
  MOEKERN_INLINE void add(const T* y) {
    const Shorts bits = read<Shorts>(y) & 0x7FFF;
    top = bits > top ? bits : top;
  }
  MOEKERN_INLINE Top joined(const Top& other) const {
    return {other.top > top ? other.top : top};
  }
  MOEKERN_INLINE float largest() const {
    int16_t most = 0;
    for (int j = 0; j < 2 * kVector; ++j) most = top[j] > most ? top[j] : most;
    return load(T{static_cast<uint16_t>(most)});
  }
};
template <>
struct Top<float> {
  Ints a = {}, b = {};
  MOEKERN_INLINE void add(const float* y) {
    const Ints u = read<Ints>(y) & 0x7FFFFFFF, v = read<Ints>(y + kVector) & 0x7FFFFFFF;
    a = u > a ? u : a;
    b = v > b ? v : b;
  }
  MOEKERN_INLINE Top joined(const Top& other) const {
    return {other.a > a ? other.a : a, other.b > b ? other.b : b};
  }
  MOEKERN_INLINE float largest() const {
    int32_t most = 0;
    for (int j = 0; j < kVector; ++j) most = std::max({most, a[j], b[j]});
    return bit_cast<float>(most);
  }
};

// A line of 64 bytes that is read soon, into the second-level cache.
MOEKERN_INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

MOEKERN_INLINE float larger(float a, float b) { return b > a ? b : a; }

// The 8 lanes of a sum, always in this order.
MOEKERN_INLINE float sum_of_lanes(const Floats& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

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
