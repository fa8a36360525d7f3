// Slots of tokens and their rows; the slots of one token in the lanes of a warp, at most one each.
#pragma once

#include "launch.h"

namespace moekern::cuda {

// row_of[slot] = row for the rows that experts have, of tokens that count; the rest stays as it is.
template <int kThreads>
__global__ void row_of_kernel(const int64_t* order, const int64_t* offsets, const bool* mask, int64_t E, int64_t N,
                              int64_t slots, int64_t K, int64_t* row_of) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= N || n >= offsets[E]) return;
  const int64_t slot = order[n];
  if (slot >= 0 && slot < slots && (!mask || mask[slot / K])) row_of[slot] = n;
}

// The row's slot; -1 where the sums do not count it.
template <class Experts>
__device__ int64_t counted_slot(const Experts& a, int64_t row) {
  const int64_t slot = a.order[row];
  return slot >= 0 && slot < a.slots && (!a.mask || a.mask[slot / a.K]) ? slot : -1;
}

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
