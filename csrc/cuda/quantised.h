// Reading quantised weights in float32, eight at a time: 8 columns of a row, or for int4_rows 8 rows of a column.
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

// AWQ stores columns 0 2 4 6 1 3 5 7 from the lowest bits of a word up, all others 0 to 7.
template <bool kAwq>
struct Int4 {
  static constexpr int kBytes = 4;
  static __device__ float value(uint64_t codes, int i) {
    const int shift = kAwq ? i % 2 * 16 + i / 2 * 4 : 4 * i;
    return static_cast<float>(static_cast<int>(codes >> shift & 15u) - 8);
  }
};

struct Int4Rows : Int4<false> {};  // a word is one column of eight rows, the first in the lowest bits

template <class Coding>
constexpr bool kDown = false;  // eight lie in a column
template <>
constexpr bool kDown<Int4Rows> = true;

// Calls f with the coding's reader.
template <class F>
void with_coding(Coding coding, const F& f) {
  switch (coding) {
    case Coding::e4m3: return f(E4M3{});
    case Coding::e5m2: return f(E5M2{});
    case Coding::int8: return f(Int8{});
    case Coding::e2m1: return f(E2M1{});
    case Coding::int4: return f(Int4<false>{});
    case Coding::int4_awq: return f(Int4<true>{});
    case Coding::int4_rows: return f(Int4Rows{});
  }
}

// How many eights an expert has, line by line; checked, so that 32 bits number them.
inline uint32_t eights_of(const Quantised& q) {
  const int64_t a_line = q.coding == Coding::int4_rows ? q.C : (q.C + 7) / 8;
  if (std::max({q.R, q.C, q.block_rows, q.block_columns}) >> 31 || (a_line && q.L >> 31) ||
      (q.L && a_line >= (int64_t{1} << 31) / q.L))
    throw ArgumentError("codes", "expected fewer than 2^31 rows and columns, and 2^34 weights an expert");
  return static_cast<uint32_t>(q.L * a_line);
}

// n <= kBytes bytes, in the lowest bits.
template <int kBytes>
__device__ inline uint64_t read_codes(const uint8_t* from, int n) {
  if (n == 8 && lies_on(from, 8)) return *reinterpret_cast<const uint64_t*>(from);
  if (kBytes == 4 && lies_on(from, 4)) return *reinterpret_cast<const uint32_t*>(from);
  uint64_t codes = 0;
  for (int i = 0; i < n; ++i) codes |= static_cast<uint64_t>(from[i]) << 8 * i;
  return codes;
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
  const uint8_t* from = q.codes + (e * q.L + line) * q.B + static_cast<int64_t>(place) * Coding::kBytes;
  const uint64_t codes = read_codes<Coding::kBytes>(from, Coding::kBytes == 4 ? 4 : to.n);
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
