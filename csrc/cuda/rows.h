// Adding up what blocks leave behind: float64, in an order that depends on the sizes alone.
#pragma once

#include "launch.h"

namespace moekern::cuda {

constexpr int64_t kRowsTogether = 64;

// to[g, c] is the sum of rows [64 g, 64 g + 64) of from [rows, columns]; the last step adds to what is there.
template <class From>
__global__ void add_rows_kernel(const From* from, int64_t rows, int64_t columns, bool last, double* to) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, first = blockIdx.y * kRowsTogether;
  if (column >= columns) return;
  const int64_t stop = min(first + kRowsTogether, rows);
  double sum = 0;
#pragma unroll 8
  for (int64_t row = first; row < stop; ++row) sum += static_cast<double>(from[row * columns + column]);
  double* at = to + blockIdx.y * columns + column;
  *at = last ? *at + sum : sum;
}

// to [columns] += the rows of from [rows, columns].
template <class From>
void add_rows(const From* from, int64_t rows, int64_t columns, double* to, cudaStream_t stream) {
  if (rows == 0) return;
  const int64_t groups = parts(rows, kRowsTogether);
  const int block = columns < 128 ? kWarp : 128;
  const dim3 grid = blocks(parts(columns, block), groups);
  if (groups == 1) return launch(add_rows_kernel<From>, grid, block, 0, stream, from, rows, columns, true, to);
  const Scratch<double> sums(groups * columns, stream);
  launch(add_rows_kernel<From>, grid, block, 0, stream, from, rows, columns, false, sums);
  add_rows<double>(sums, groups, columns, to, stream);
}

}  // namespace moekern::cuda
