// Plain loops over a fixed number of lanes, compiled once per instruction set and chosen at run time. The order of every
// sum is written in the source and contraction is off, so all instruction sets give the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "../floats.h"
#include "../kernels.h"

namespace moekern::cpu {

using moekern::load;  // other codes have overloads here

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

// Eight lanes, for loops that compilers do not vectorise well. One AVX register; elsewhere the compiler splits it.
// Aligned to 16 at every level: GCC's own choice depends on the level, and memory is shared between levels.
constexpr int kVector = 8;
typedef float Floats __attribute__((vector_size(4 * kVector), aligned(16)));
typedef uint32_t Words __attribute__((vector_size(4 * kVector), aligned(16)));
typedef int32_t Ints __attribute__((vector_size(4 * kVector), aligned(16)));
typedef int16_t Shorts __attribute__((vector_size(4 * kVector), aligned(16)));
// Halves of these, down to which sums and maxima go.
typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));
typedef int16_t Shorts8 __attribute__((vector_size(16)));

template <class V>
MOEKERN_INLINE V read(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// The larger of each lane of the first half and its fellow in the second: of two equal ones, and where either is NaN,
// the first.
template <class Half, class V>
MOEKERN_INLINE Half larger_half(const V& v) {
  const auto low = read<Half>(&v), high = read<Half>(reinterpret_cast<const char*>(&v) + sizeof(Half));
  return high > low ? high : low;
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
    const auto v = larger_half<Shorts8>(top);
    const int16_t a = std::max(v[0], v[4]), b = std::max(v[1], v[5]), c = std::max(v[2], v[6]), d = std::max(v[3], v[7]);
    return load(T{static_cast<uint16_t>(std::max(std::max(a, c), std::max(b, d)))});
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
    const auto v = larger_half<Ints4>(b > a ? b : a);
    return bit_cast<float>(std::max(std::max(v[0], v[2]), std::max(v[1], v[3])));
  }
};

// A line of 64 bytes that is read soon, into the second-level cache.
MOEKERN_INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// The 8 lanes of a sum, always in this order: halves upon each other.
MOEKERN_INLINE float sum_of_lanes(const Floats& v) {
  const auto low = read<Floats4>(&v), high = read<Floats4>(reinterpret_cast<const char*>(&v) + sizeof(Floats4));
  const Floats4 four = low + high;
  const Floats4 two = four + Floats4{four[2], four[3], four[2], four[3]};
  return two[0] + two[1];
}

// The lanes of a sum or a maximum, kLanes or half of them: halves upon each other down to one, always in this order.
template <int kWidth = kLanes>
MOEKERN_INLINE float sum_of(const float* lane) {
  static_assert(kWidth == 2 * kVector || kWidth == 4 * kVector);
  Floats a = read<Floats>(lane), b = read<Floats>(lane + kVector);
  if (kWidth == 4 * kVector) {
    a += read<Floats>(lane + 2 * kVector);
    b += read<Floats>(lane + 3 * kVector);
  }
  return sum_of_lanes(a + b);
}

template <int kWidth = kLanes>
MOEKERN_INLINE float max_of(const float* lane) {
  static_assert(kWidth == 2 * kVector || kWidth == 4 * kVector);
  Floats a = read<Floats>(lane), b = read<Floats>(lane + kVector);
  if (kWidth == 4 * kVector) {
    const Floats c = read<Floats>(lane + 2 * kVector), d = read<Floats>(lane + 3 * kVector);
    a = c > a ? c : a;
    b = d > b ? d : b;
  }
  const auto four = larger_half<Floats4>(b > a ? b : a);
  return larger(larger(four[0], four[2]), larger(four[1], four[3]));
}

}  // namespace moekern::cpu
