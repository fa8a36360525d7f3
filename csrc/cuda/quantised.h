// Reading quantised weights in float32, eight at a time: 8 columns of a row, or for rows.. 8 rows of a column.
#pragma once

#include "eight.h"

namespace moekern::cuda {

// The value of the i-th of eight codes. Shifting a small float's bits into place leaves its exponent too small by the
// difference of the biases, which one exact product puts right, subnormals included.
struct E4M3 {
  static constexpr int kBytes = 8;
  static __device__ float value(uint64_t codes, int i) {
    const uint32_t code = static_cast<uint32_t>(codes >> 8 * i) & 0xFFu, magnitude = code & 0x7Fu;
    const float finite = bit_cast<float>(magnitude << 20) * 0x1p120f;
    const uint32_t bits = magnitude == 0x7Fu ? 0x7FC00000u : bit_cast<uint32_t>(finite);
    return bit_cast<float>(bits | (code & 0x80u) << 24);
  }
};

struct E5M2 {  // the upper half of a float16
  static constexpr int kBytes = 8;
  static __device__ float value(uint64_t codes, int i) {
    return load(float16{static_cast<uint16_t>((codes >> 8 * i & 0xFFu) << 8)});
  }
};

struct Int8 {
  static constexpr int kBytes = 8;
  static __device__ float value(uint64_t codes, int i) { return static_cast<int8_t>(codes >> 8 * i & 0xFFu); }
};

struct E2M1 {
  static constexpr int kBytes = 4;
  static __device__ float value(uint64_t codes, int i) {
    const uint32_t code = static_cast<uint32_t>(codes >> 4 * i) & 15u;
    const float magnitude = bit_cast<float>((code & 7u) << 22) * 0x1p126f;
    return bit_cast<float>(bit_cast<uint32_t>(magnitude) | (code & 8u) << 28);
  }
};

// Codes without a sign, less half of what they reach: eight of them in as many bytes as they have bits. From the lowest
// bits of a word up AWQ stores columns 0 2 4 6 1 3 5 7 of 4 bits and 0 2 1 3 of 8, all others one after another.
template <int kBits, bool kAwq>
struct Packed {
  static constexpr int kBytes = kBits;
  static __device__ float value(uint64_t codes, int i) {
    constexpr int kWord = 32 / kBits;  // codes, of AWQ's
    const int place = kAwq ? i / kWord * kWord + i % kWord / 2 + i % 2 * (kWord / 2) : i;
    const int code = static_cast<int>(codes >> kBits * place & ((1u << kBits) - 1));
    return static_cast<float>(code - (1 << (kBits - 1)));
  }
};

template <int kBits>
struct Rows : Packed<kBits, false> {};  // eight lie in a column, whose words are a line each

template <class Coding>
constexpr bool kDown = false;
template <int kBits>
constexpr bool kDown<Rows<kBits>> = true;

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

// How many eights an expert has, one row, or eight rows of all columns, after another; checked, so that 32 bits number
// them.
inline uint32_t eights_of(const Quantised& q) {
  bool down = false;
  with_coding(q.coding, [&](auto coding) { down = kDown<decltype(coding)>; });
  const int64_t lines = down ? (q.R + 7) / 8 : q.R, a_line = down ? q.C : (q.C + 7) / 8;
  if (std::max({q.R, q.C, q.block_rows, q.block_columns}) >> 31 ||
      (lines && a_line >= (int64_t{1} << 31) / lines))
    throw ArgumentError("codes", "expected fewer than 2^31 rows and columns, and 2^34 weights an expert");
  return static_cast<uint32_t>(lines * a_line);
}

// n <= kBytes bytes, in the lowest bits.
template <int kBytes>
__device__ inline uint64_t read_codes(const uint8_t* from, int n) {
  if (n == 8 && lies_on(from, 8)) return *reinterpret_cast<const uint64_t*>(from);
  if (kBytes == 4 && n == 4 && lies_on(from, 4)) return *reinterpret_cast<const uint32_t*>(from);
  uint64_t codes = 0;
  for (int i = 0; i < n; ++i) codes |= static_cast<uint64_t>(from[i]) << 8 * i;
  return codes;
}

__device__ inline uint64_t read_word(const uint8_t* from) { return read_codes<4>(from, 4); }

// The i-th eight codes of a column, and what comes behind them: of one word, or of two where they straddle.
template <int kBits>
__device__ inline uint64_t read_down(const Quantised& q, uint32_t e, uint32_t i, uint32_t column) {
  const int64_t start = int64_t{8} * kBits * i, line = start / 32;
  const int shift = start % 32;
  const uint8_t* from = q.codes + (e * q.L + line) * q.B + int64_t{4} * column;
  uint64_t codes = read_word(from);
  if (shift + 8 * kBits > 32 && line + 1 < q.L) codes |= read_word(from + q.B) << 32;
  return codes >> shift;
}

// A scale in float32. u8 is a power of two biased by 127: the largest is NaN, the smallest a subnormal.
__device__ inline float scale_at(const Typed& scale, int64_t i) {
  switch (scale.dtype) {
    case Dtype::u8: {
      const uint32_t bits = static_cast<const uint8_t*>(scale.data)[i];
      return bit_cast<float>(bits == 0 ? 0x00400000u : bits == 255 ? 0x7FC00000u : bits << 23);
    }
    case Dtype::bf16: return load(static_cast<const bfloat16*>(scale.data)[i]);
    case Dtype::f16: return load(static_cast<const float16*>(scale.data)[i]);
    default: return static_cast<const float*>(scale.data)[i];
  }
}

// A place on an axis that is cut into blocks: one division, then none a step.
struct Block {
  uint32_t number, left, size;
  __device__ Block(uint32_t at, int64_t size_) : size(size_) {
    number = at / size;
    left = size - at % size;
  }
  __device__ void step() {
    if (--left != 0) return;
    ++number;
    left = size;
  }
};

// The scale and zero point that are in use, kept while the next weight shares them.
struct Scale {
  float scale = 0, zero = 0;
  int64_t at = -1;

  // A line that is not there, from a group which nothing here can refuse, makes its weights NaN.
  __device__ void move_to(const Quantised& q, uint32_t e, int64_t line, uint32_t column) {
    const bool is_there = line >= 0 && line < q.S;
    const int64_t next = is_there ? (e * q.S + line) * q.Q + column : -1;
    if (next == at && is_there) return;
    at = next;
    scale = is_there ? scale_at(q.scale, at) : bit_cast<float>(0x7FC00000u);
    zero = is_there && q.zero ? q.zero[at] : 0;
  }

  __device__ float times(const Quantised& q, float value) const { return (q.zero ? value - zero : value) * scale; }
};

// Where eight weights lie, and how many of them there are; the others are 0.
struct EightWeights {
  uint32_t row, column;
  int n;
  float v[8];
};

template <class Coding>
__device__ inline void read_weights(const Quantised& q, uint32_t e, uint32_t i, EightWeights& to) {
  constexpr bool down = kDown<Coding>;
  const uint32_t R = q.R, C = q.C, a_line = down ? C : (C + 7) / 8, line = i / a_line, place = i % a_line;
  to.row = down ? 8 * line : line;
  to.column = down ? place : 8 * place;
  const uint32_t left = down ? R - to.row : C - to.column;
  to.n = left < 8 ? left : 8;
  uint64_t codes;
  if constexpr (down) {
    codes = read_down<Coding::kBytes>(q, e, line, place);
  } else {
    const int64_t at = static_cast<int64_t>(place) * Coding::kBytes, rest = q.B - at;
    const uint8_t* from = q.codes + (e * q.L + line) * q.B + at;
    codes = read_codes<Coding::kBytes>(from, rest < Coding::kBytes ? static_cast<int>(rest) : Coding::kBytes);
  }
  Block block_row(to.row, q.block_rows), block_column(to.column, q.block_columns);
  Scale scale;
  for (int j = 0; j < 8; ++j) {
    to.v[j] = 0;
    if (j >= to.n) continue;
    const int64_t line = q.group ? q.group[e * q.R + to.row + (down ? j : 0)] : block_row.number;
    scale.move_to(q, e, line, block_column.number);
    to.v[j] = scale.times(q, Coding::value(codes, j));
    down ? block_row.step() : block_column.step();
  }
}

}  // namespace moekern::cuda
