// Rows that are grouped by expert.
#pragma once

#include "launch.h"

namespace moekern::cuda {

// The rows of expert e, whatever the offsets hold.
struct Range {
  int64_t first, stop;
};
__device__ inline Range rows_of(const int64_t* offsets, int64_t e, int64_t N) {
  const int64_t first = max(int64_t{0}, min(offsets[e], N));
  return {first, max(first, min(offsets[e + 1], N))};
}

}  // namespace moekern::cuda
