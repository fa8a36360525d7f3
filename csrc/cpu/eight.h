// Codes of quantised weights in the eight lanes of simd.h.
#pragma once

#include "simd.h"

namespace moekern::cpu {

constexpr int kEights = kLanes / kVector;

using F8 = Floats;
using I8 = Ints;
using U8 = Words;
using U64x4 = uint64_t __attribute__((vector_size(32), aligned(16)));

template <class Vector>
MOEKERN_INLINE void read(const void* from, Vector& to) {
  std::memcpy(&to, from, sizeof to);
}

// Eight bytes, each in the upper quarter of a word.
MOEKERN_INLINE void read_bytes(const uint8_t* from, U8& to) {
  uint64_t eight;
  read(from, eight);
  const U8 words = (U8)(U64x4{} + eight) << U8{24, 24, 16, 16, 8, 8, 0, 0};  // columns 0 4 1 5 2 6 3 7
  to = __builtin_shuffle(words, U8{0, 2, 4, 6, 1, 3, 5, 7}) & 0xFF000000u;
}

}  // namespace moekern::cpu
