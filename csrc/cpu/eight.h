// Eight lanes as one vector of the compiler: GCC and Clang split it into what the instruction set has, and keep 32 lanes
// of running sums in registers, which they do not do for arrays. Lane by lane the operations of simd.h, so the same bits.
#pragma once

#include "simd.h"

namespace moekern::cpu {

constexpr int kEights = kLanes / 8;

using F8 = float __attribute__((vector_size(32)));
using I8 = int32_t __attribute__((vector_size(32)));
using U8 = uint32_t __attribute__((vector_size(32)));
using U64x4 = uint64_t __attribute__((vector_size(32)));

template <class Vector>
MOEKERN_INLINE void read(const void* from, Vector& to) {
  std::memcpy(&to, from, sizeof to);
}

// What load() of a float16 in the upper half of each word gives.
MOEKERN_INLINE void widen_float16(const U8& wide, F8& to) {
  const U8 rest = wide & 0x7FFFFFFFu;
  const F8 normal = (F8)((rest >> 3) + (0xE0u << 23)) * 0x1p-112f;
  const F8 subnormal = (F8)((rest >> 16) | (126u << 23)) - 0.5f;
  to = (F8)((wide & 0x80000000u) | ((I8)rest < (1 << 26) ? (U8)subnormal : (U8)normal));
}

// Sixteen values in an order of its own: halves of words are cheaper to take apart than to keep in sequence.
MOEKERN_INLINE void load16(const float* from, F8& a, F8& b) {
  read(from, a);
  read(from + 8, b);
}
MOEKERN_INLINE void load16(const bfloat16* from, F8& a, F8& b) {
  U8 words;
  read(from, words);
  a = (F8)(words << 16);
  b = (F8)(words & 0xFFFF0000u);
}
MOEKERN_INLINE void load16(const float16* from, F8& a, F8& b) {
  U8 words;
  read(from, words);
  widen_float16(words << 16, a);
  widen_float16(words & 0xFFFF0000u, b);
}

// Eight bytes, each in the upper quarter of a word.
MOEKERN_INLINE void read_bytes(const uint8_t* from, U8& to) {
  uint64_t eight;
  read(from, eight);
  const U8 words = (U8)(U64x4{} + eight) << U8{24, 24, 16, 16, 8, 8, 0, 0};  // columns 0 4 1 5 2 6 3 7
  to = __builtin_shuffle(words, U8{0, 2, 4, 6, 1, 3, 5, 7}) & 0xFF000000u;
}

}  // namespace moekern::cpu
