// Eight numbers at a time, as they are stored.
#pragma once

#include "launch.h"

namespace moekern::cuda {

template <class T>
struct alignas(16) Eight {
  T at[8];
};

__device__ inline bool lies_on(const void* at, int bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

// Columns [c, c + 8) of a row of H, zero from H on and where there is no row.
template <class T>
__device__ inline Eight<T> read_eight(const T* row, int64_t c, int64_t H) {
  Eight<T> eight = {};
  if (!row) return eight;
  if (c + 8 <= H && lies_on(row + c, 16)) return *reinterpret_cast<const Eight<T>*>(row + c);
  for (int j = 0; j < 8; ++j)
    if (c + j < H) eight.at[j] = row[c + j];
  return eight;
}

}  // namespace moekern::cuda
