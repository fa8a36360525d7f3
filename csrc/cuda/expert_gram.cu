// Gram matrices of experts' activations and their products with residuals: a block has a tile of one expert's, adds
// chunks of rows in float32 and these in float64, in the rows' order.
#include "grouped.h"
#include "tiles.h"

namespace moekern::cuda {
namespace {

constexpr int kTile = 64, kEach = 8;
constexpr int64_t kChunk = 256;  // rows whose products are added in float32
using Mine = Owned<kTile, kEach>;
static_assert(kChunk % kDepth == 0, "a chunk ends with what is in shared memory");

struct Call {
  ExpertGram args;
  int a_side, of_gram, of_product;  // tiles: along A, of A'A's upper triangle, along R
};

// Row n of A, or of what it goes with; null for one that does not count.
__device__ inline const float* row_of_a(const ExpertGram& args, int64_t n, int64_t stop) {
  return n < stop && (!args.mask || args.mask[n]) ? args.a + n * args.M : nullptr;
}

__device__ inline const float* row_of_r(const ExpertGram& args, int64_t n, int64_t stop) {
  if (n >= stop || (args.mask && !args.mask[n])) return nullptr;
  const int64_t t = args.tokens ? args.tokens[n] : n;
  return t >= 0 && t < args.T ? args.r + t * args.H : nullptr;
}

// Block (tile, expert).
__global__ void __launch_bounds__(kTileThreads) multiply_rows(Call call) {
  __shared__ Side<kTile> sides[2];
  const ExpertGram& args = call.args;
  const int64_t e = blockIdx.y;
  const Range range = rows_of(args.offsets, e, args.N);
  const bool symmetric = static_cast<int>(blockIdx.x) < call.of_gram;
  int tile_row, tile_column;
  if (symmetric) {
    tile_at(blockIdx.x, call.a_side, tile_row, tile_column);
  } else {
    tile_row = (blockIdx.x - call.of_gram) / call.of_product;
    tile_column = (blockIdx.x - call.of_gram) % call.of_product;
  }
  const int64_t row = int64_t{tile_row} * kTile, column = int64_t{tile_column} * kTile;
  const int64_t width = symmetric ? args.M : args.H;
  double* to = symmetric ? args.gram + e * args.M * args.M : args.product + e * args.M * args.H;
  const int row_line = threadIdx.x / Mine::kLines, column_line = threadIdx.x % Mine::kLines;

  Products<kTile, kEach> products;
  CarriedRows<kTile> a, b;
  const auto fetch = [&](int64_t n) {
    a.fetch([&](int k) { return row_of_a(args, n + k, range.stop); }, row, args.M);
    if (symmetric)
      b.fetch([&](int k) { return row_of_a(args, n + k, range.stop); }, column, args.M);
    else
      b.fetch([&](int k) { return row_of_r(args, n + k, range.stop); }, column, args.H);
  };
  fetch(range.first);
  for (int64_t n = range.first; n < range.stop; n += kDepth) {
    __syncthreads();
    a.put(sides[0]);
    b.put(sides[1]);
    __syncthreads();
    fetch(n + kDepth);
    products.add_columns(sides[0], sides[1], row_line, column_line);
    if ((n + kDepth - range.first) % kChunk != 0 && n + kDepth < range.stop) continue;
    products.take_chain(row_line, column_line, [&](int r, int c, float sum) {
      const int64_t i = row + r, j = column + c;
      if (i >= args.M || j >= width || (symmetric && i > j)) return;
      const double all = to[i * width + j] + sum;
      to[i * width + j] = all;
      if (symmetric) to[j * width + i] = all;
    });
  }
}

}  // namespace

void expert_gram(const ExpertGram& args, void* stream) {
  Call call{args, static_cast<int>(parts(args.M, kTile)), 0, static_cast<int>(parts(args.H, kTile))};
  call.of_gram = args.gram ? call.a_side * (call.a_side + 1) / 2 : 0;
  launch(multiply_rows, blocks(call.of_gram + int64_t{call.a_side} * call.of_product, args.E), kTileThreads, 0,
         static_cast<cudaStream_t>(stream), call);
}

}  // namespace moekern::cuda
