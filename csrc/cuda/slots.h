// The slots of one token in the lanes of a warp, at most one each.
#pragma once

#include "launch.h"

namespace moekern::cuda {

// f(before): once for each lane that has an expert, where `before` counts lower lanes with the same expert. Lanes with
// equal experts follow one another, so f may change what belongs to its expert.
template <class F>
__device__ void in_turns(int expert, int K, int lane, const F& f) {
  int before = 0;
  for (int k = 0; k < K; ++k) before += __shfl_sync(kAll, expert, k) == expert && k < lane;
  for (int turn = 0; __any_sync(kAll, expert >= 0 && before >= turn); ++turn) {
    if (expert >= 0 && before == turn) f();
    __syncwarp();
  }
}

}  // namespace moekern::cuda
