// One number from all threads of a block, added in a fixed order.
#pragma once

#include "launch.h"

namespace moekern::cuda {

// Valid in thread 0. kThreads is a power of two and the block's size; shared memory may be used again at once.
template <int kThreads, class T, class Join>
__device__ T block_reduce(T mine, const Join& join) {
  __shared__ T of[kThreads];
  const int thread = threadIdx.x;
  of[thread] = mine;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (thread < width) of[thread] = join(of[thread], of[thread + width]);
  }
  const T all = of[0];
  __syncthreads();
  return all;
}

template <int kThreads, class T>
__device__ T block_sum(T mine) {
  return block_reduce<kThreads>(mine, [](T a, T b) { return a + b; });
}

}  // namespace moekern::cuda
