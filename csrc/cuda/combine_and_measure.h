// combine_and_measure in two parts: what one read of the rows gives, and its sums by expert.
#pragma once

#include "launch.h"

namespace moekern::cuda {

// Scratch memory that the first part fills for the second.
struct RowMeasures {
  float* square;   // [N] sum of the row's squares
  float* inverse;  // [N] one over its norm, 0 for norm 0; -1 where the token does not count
  float* top;      // [N] largest |y|
  double* gated;   // [T, K] gate x norm, 0 for empty slots
  double* turn;    // [T] 1 - cos(h, h + out), or null
};

void add_expert_sums(const CombineAndMeasure& args, const RowMeasures& rows, cudaStream_t stream);
void add_dimensions(const CombineAndMeasure& args, const RowMeasures& rows, cudaStream_t stream);

}  // namespace moekern::cuda
