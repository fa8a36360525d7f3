// Reading quantised weights in float32, 8 columns of a row at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "eight.h"

namespace moekern::cpu {

// A float of few bits without its sign; infinities and NaN are the caller's. No subnormal is computed with.
template <int kMantissa, int kBias>
MOEKERN_INLINE void small_float(const U8& magnitude, U8& to) {
  constexpr uint32_t kLeast = (128u - kBias) << 23;  // the smallest normal number
  const U8 bits = magnitude << (23 - kMantissa);
  const F8 subnormal = (F8)(bits + kLeast) - bit_cast<float>(kLeast);
  to = (I8)magnitude < (1 << kMantissa) ? (U8)subnormal : bits + ((127u - kBias) << 23);
}

// Codings whose rows are lines.
struct Across {
  static int64_t line(int64_t row) { return row; }
  static constexpr bool straddles(int64_t) { return false; }
};

// What follows reads the values of 8 columns from kBytes bytes, and where a row straddles two lines from the next too.
struct E4M3 : Across {
  static constexpr int kBytes = 8;
  static MOEKERN_INLINE void load(const uint8_t* from, const uint8_t*, int64_t, F8& v) {
    U8 code, finite;
    read_bytes(from, code);
    const U8 magnitude = code >> 24 & 0x7Fu;
    small_float<3, 7>(magnitude, finite);
    v = (F8)(((I8)magnitude == 0x7F ? U8{} + 0x7FC00000u : finite) | (code & 0x80000000u));
  }
};

struct E5M2 : Across {  // the upper half of a float16
  static constexpr int kBytes = 8;
  static MOEKERN_INLINE void load(const uint8_t* from, const uint8_t*, int64_t, F8& v) {
    U8 code;
    read_bytes(from, code);
    v = widened<Floats>(code, float16{});
  }
};

struct Int8 : Across {
  static constexpr int kBytes = 8;
  static MOEKERN_INLINE void load(const uint8_t* from, const uint8_t*, int64_t, F8& v) {
    U8 code;
    read_bytes(from, code);
    v = __builtin_convertvector((I8)code >> 24, F8);
  }
};

// Eight codes in as many bytes as they have bits. From the lowest bits of a word up AWQ stores columns 0 2 4 6 1 3 5 7
// of 4 bits and 0 2 1 3 of 8, all others one after another.
template <int kBits, bool kAwq>
MOEKERN_INLINE void eight_codes(const uint8_t* from, U8& code) {
  constexpr uint32_t b = kBits;
  if constexpr (kBits == 8) {
    uint32_t words[2];
    read(from, words);
    const uint32_t low = words[0], high = words[1];
    constexpr U8 kShift = kAwq ? U8{0, 16, 8, 24, 0, 16, 8, 24} : U8{0, 8, 16, 24, 0, 8, 16, 24};
    code = U8{low, low, low, low, high, high, high, high} >> kShift & 255u;
  } else {
    uint32_t word = 0;
    for (int i = 0; i < kBits; ++i) word |= uint32_t{from[i]} << 8 * i;  // one load where there is one so wide
    constexpr U8 kShift = kAwq ? U8{0, 16, 4, 20, 8, 24, 12, 28} : U8{0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b};
    code = (U8{} + word) >> kShift & ((1u << b) - 1);
  }
}

struct E2M1 : Across {
  static constexpr int kBytes = 4;
  static MOEKERN_INLINE void load(const uint8_t* from, const uint8_t*, int64_t, F8& v) {
    U8 code, finite;
    eight_codes<4, false>(from, code);
    small_float<1, 1>(code & 7u, finite);
    v = (F8)(finite | (code & 8u) << 28);
  }
};

// Codes without a sign, less half of what they reach.
template <int kBits>
MOEKERN_INLINE void centred(const U8& code, F8& v) {
  v = __builtin_convertvector((I8)code - (1 << (kBits - 1)), F8);
}

template <int kBits, bool kAwq>
struct Packed : Across {
  static constexpr int kBytes = kBits;
  static MOEKERN_INLINE void load(const uint8_t* from, const uint8_t*, int64_t, F8& v) {
    U8 code;
    eight_codes<kBits, kAwq>(from, code);
    centred<kBits>(code, v);
  }
};

template <int kBits>
struct Rows {  // a line is a word of each column: codes of a column one after another, the first in the lowest bits
  static constexpr int kBytes = 32;
  static int64_t line(int64_t row) { return row * kBits / 32; }
  static MOEKERN_INLINE bool straddles(int64_t row) { return 32 % kBits != 0 && row * kBits % 32 > 32 - kBits; }
  static MOEKERN_INLINE void load(const uint8_t* from, const uint8_t* next, int64_t row, F8& v) {
    const auto shift = static_cast<uint32_t>(row * kBits % 32);
    U8 eight;
    read(from, eight);
    eight = eight >> shift;
    if (straddles(row)) {
      U8 above;
      read(next, above);
      eight |= above << (32 - shift);
    }
    centred<kBits>(eight & ((1u << kBits) - 1), v);
  }
};

// A power of two biased by 127; the largest code is NaN, the smallest a subnormal.
struct e8m0 {
  uint8_t bits;
};
MOEKERN_INLINE float load(e8m0 v) {
  const uint32_t normal = static_cast<uint32_t>(v.bits) << 23;
  return bit_cast<float>(v.bits == 0 ? 0x00400000u : v.bits == 255 ? 0x7FC00000u : normal);
}

// Calls f with the coding's reader.
template <class F>
void with_coding(Coding coding, const F& f) {
  switch (coding) {
    case Coding::e4m3: return f(E4M3{});
    case Coding::e5m2: return f(E5M2{});
    case Coding::int8: return f(Int8{});
    case Coding::e2m1: return f(E2M1{});
    case Coding::packed2: return f(Packed<2, false>{});
    case Coding::packed3: return f(Packed<3, false>{});
    case Coding::packed4: return f(Packed<4, false>{});
    case Coding::packed8: return f(Packed<8, false>{});
    case Coding::awq4: return f(Packed<4, true>{});
    case Coding::awq8: return f(Packed<8, true>{});
    case Coding::rows2: return f(Rows<2>{});
    case Coding::rows3: return f(Rows<3>{});
    case Coding::rows4: return f(Rows<4>{});
    case Coding::rows8: return f(Rows<8>{});
  }
}

// One line of scales or zero points, widened to the columns of a row.
template <class T>
MOEKERN_INLINE void widen_as(const T* from, const Quantised& q, float* to) {
  if (q.block_columns == 1) {
    for (int64_t c = 0; c < q.C; ++c) to[c] = load(from[c]);
    return;
  }
  for (int64_t i = 0; i < q.Q; ++i) {
    const float value = load(from[i]);
    const int64_t stop = std::min(q.C, (i + 1) * q.block_columns);
    for (int64_t c = i * q.block_columns; c < stop; ++c) to[c] = value;
  }
}

// The scales and zero points of the row that is read, kept while the rows that follow share them.
class Scales {
 public:
  explicit Scales(const Quantised& q) : q_(q), scale_(padded(q.C)), zero_(q.zero ? padded(q.C) : 0) {}

  MOEKERN_INLINE void move_to(int64_t e, int64_t r) {
    const int64_t line = e * q_.S + (q_.group ? q_.group[e * q_.R + r] : r / q_.block_rows);
    if (line == line_) return;
    line_ = line;
    const int64_t first = line * q_.Q;
    float* scale = scale_.data();
    switch (q_.scale.dtype) {
      case Dtype::u8: widen_as(static_cast<const e8m0*>(q_.scale.data) + first, q_, scale); break;
      case Dtype::bf16: widen_as(static_cast<const bfloat16*>(q_.scale.data) + first, q_, scale); break;
      case Dtype::f16: widen_as(static_cast<const float16*>(q_.scale.data) + first, q_, scale); break;
      default: widen_as(static_cast<const float*>(q_.scale.data) + first, q_, scale);
    }
    if (q_.zero) widen_as(q_.zero + first, q_, zero_.data());
  }

  const float* scale() const { return scale_.data(); }
  const float* zero() const { return q_.zero ? zero_.data() : nullptr; }

 private:
  static int64_t padded(int64_t C) { return (C + kLanes - 1) / kLanes * kLanes; }  // zeros: a tail's spare lanes are 0

  const Quantised& q_;
  std::vector<float> scale_, zero_;
  int64_t line_ = -1;
};

template <class Coding>
MOEKERN_INLINE void read_lanes(const uint8_t* from, const uint8_t* next, int64_t r, const float* scale,
                               const float* zero, F8* v) {
  for (int k = 0; k < kEights; ++k) {
    F8 scales, zeros;
    Coding::load(from + k * Coding::kBytes, next + k * Coding::kBytes, r, v[k]);
    if (zero) {
      read(zero + 8 * k, zeros);
      v[k] -= zeros;
    }
    read(scale + 8 * k, scales);
    v[k] *= scales;
  }
}

// use(c, n, v) for each 32 columns of a row, from left to right: columns c to c + n, then zeros.
template <class Coding, class Use>
MOEKERN_INLINE void read_row(const Quantised& q, int64_t e, int64_t r, Scales& scales, const Use& use) {
  constexpr int64_t kBytes = kEights * Coding::kBytes;
  scales.move_to(e, r);
  const float *scale = scales.scale(), *zero = scales.zero();
  const uint8_t* from = q.codes + (e * q.L + Coding::line(r)) * q.B;
  const int64_t to_next = Coding::straddles(r) ? q.B : 0;
  const int64_t C = q.C, whole = C / kLanes * kLanes;
  F8 v[kEights];
  for (int64_t c = 0; c < whole; c += kLanes, from += kBytes) {
    read_lanes<Coding>(from, from + to_next, r, scale + c, zero ? zero + c : nullptr, v);
    use(c, kLanes, v);
  }
  if (whole == C) return;
  uint8_t tail[kBytes] = {}, tail_of_next[kBytes] = {};
  const int64_t left = q.B - whole / kLanes * kBytes;
  std::memcpy(tail, from, left);
  if (to_next) std::memcpy(tail_of_next, from + to_next, left);
  read_lanes<Coding>(tail, tail_of_next, r, scale + whole, zero ? zero + whole : nullptr, v);
  use(whole, C - whole, v);
}

// Throws ArgumentError for a group that has no scales.
inline void check_groups(const Quantised& q) {
  for (int64_t i = 0; q.group && i < q.E * q.R; ++i)
    if (q.group[i] < 0 || q.group[i] >= q.S)
      throw ArgumentError("group", "expected values from 0 to " + std::to_string(q.S - 1) + ", got " +
                                       std::to_string(q.group[i]));
}

}  // namespace moekern::cpu
