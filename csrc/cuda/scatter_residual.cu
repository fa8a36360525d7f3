// Taking what experts put out away from the rows of their tokens: one launch an expert, so that they follow one another.
#include "grouped.h"
#include "tiles.h"

namespace moekern::cuda {
namespace {

constexpr int kTile = 64, kEach = 8;
constexpr int64_t kChunk = 256;      // channels whose products are added in float32
constexpr int64_t kRowBlocks = 128;  // that share an expert's tiles of rows, at most
using Mine = Owned<kTile, kEach>;
static_assert(kChunk % kDepth == 0, "a chunk ends with what is in shared memory");

// Block (tile of columns, share of the tiles of rows).
__global__ void __launch_bounds__(kTileThreads) subtract_rows(ScatterResidual args, int64_t e) {
  __shared__ Side<kTile> rows, columns;
  const Range range = rows_of(args.offsets, e, args.N);
  const int64_t column = int64_t{blockIdx.x} * kTile;
  const float* delta = args.delta + e * args.M * args.H;
  const int row_line = threadIdx.x / Mine::kLines, column_line = threadIdx.x % Mine::kLines;
  for (int64_t first = range.first + int64_t{blockIdx.y} * kTile; first < range.stop;
       first += int64_t{gridDim.y} * kTile) {
    const auto row_at = [&](int r) { return first + r < range.stop ? args.a + (first + r) * args.M : nullptr; };
    const auto delta_at = [&](int64_t k) { return k < args.M ? delta + k * args.H : nullptr; };
    Products<kTile, kEach> products;
    Carried<float, kTile> a;
    CarriedRows<kTile> b;
    a.fetch(row_at, 0, args.M);
    b.fetch([&](int k) { return delta_at(k); }, column, args.H);
    for (int64_t channel = 0; channel < args.M; channel += kDepth) {
      __syncthreads();
      a.put(rows);
      b.put(columns);
      __syncthreads();
      const int64_t next = channel + kDepth;
      a.fetch(row_at, next, args.M);
      b.fetch([&](int k) { return delta_at(next + k); }, column, args.H);
      products.add_columns(rows, columns, row_line, column_line);
      if (next % kChunk != 0 && next < args.M) continue;
      products.take_chain(row_line, column_line, [&](int r, int c, float sum) {
        if (first + r >= range.stop || column + c >= args.H) return;
        const int64_t t = args.tokens[first + r];
        if (t >= 0 && t < args.T) args.r[t * args.H + column + c] -= sum;
      });
    }
  }
}

}  // namespace

void scatter_residual(const ScatterResidual& args, void* stream) {
  const dim3 grid = blocks(parts(args.H, kTile), std::min(parts(args.N, kTile), kRowBlocks));
  for (int64_t e = 0; e < args.E; ++e)
    launch(subtract_rows, grid, kTileThreads, 0, static_cast<cudaStream_t>(stream), args, e);
}

}  // namespace moekern::cuda
