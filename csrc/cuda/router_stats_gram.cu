#include "router_stats.h"
#include "rows.h"

namespace moekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;            // experts by experts of a block, 4 x 4 of them a thread's
constexpr int kEach = 4;
constexpr int kStep = 16;            // tokens in shared memory
constexpr int64_t kChunk = 256;      // tokens whose products are added in float32
constexpr int64_t kBytes = 1 << 25;  // of the sums that blocks leave behind
constexpr int64_t kSlices = 32;      // of the tokens, at most

struct Gram {
  Typed logits;
  const bool* mask;
  int64_t T, each;  // each: tokens of a slice, whole chunks
  int E;
};

// Thread i reads 4 neighbouring experts of token i / 16; tokens that do not count are zeros.
__device__ inline void read_step(const Gram& a, int64_t t, int first, float (*to)[kTile]) {
  const int row = threadIdx.x / kStep, column = threadIdx.x % kStep * kEach;
  const bool counted = t + row < a.T && (!a.mask || a.mask[t + row]);
  for (int j = 0; j < kEach; ++j) {
    const int e = first + column + j;
    to[row][column + j] = counted && e < a.E ? float_at(a.logits, (t + row) * a.E + e) : 0.0f;
  }
}

// Block (tile, slice): the products of a tile's experts over a slice of the tokens, and their mirror: [slices, E, E].
__global__ void __launch_bounds__(kThreads) gram_kernel(Gram a, int tiles, double* sums) {
  __shared__ float rows[kStep][kTile], columns[kStep][kTile];
  int tile_row = 0, rest = blockIdx.x;
  for (; rest >= tiles - tile_row; ++tile_row) rest -= tiles - tile_row;  // of the tiles from the diagonal on
  const int first_row = tile_row * kTile, first_column = (tile_row + rest) * kTile;
  const int row = threadIdx.x / (kTile / kEach) * kEach, column = threadIdx.x % (kTile / kEach) * kEach;
  const int64_t first = blockIdx.y * a.each, stop = min(first + a.each, a.T);
  double total[kEach][kEach] = {};
  for (int64_t chunk = first; chunk < stop; chunk += kChunk) {
    float sum[kEach][kEach] = {};
    for (int64_t t = chunk; t < min(chunk + kChunk, stop); t += kStep) {
      read_step(a, t, first_row, rows);
      read_step(a, t, first_column, columns);
      __syncthreads();
      for (int s = 0; s < kStep; ++s)
        for (int i = 0; i < kEach; ++i)
          for (int j = 0; j < kEach; ++j) sum[i][j] = fmaf(rows[s][row + i], columns[s][column + j], sum[i][j]);
      __syncthreads();
    }
    for (int i = 0; i < kEach; ++i)
      for (int j = 0; j < kEach; ++j) total[i][j] += sum[i][j];
  }
  double* to = sums + blockIdx.y * int64_t{a.E} * a.E;
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const int e = first_row + row + i, f = first_column + column + j;
      if (e >= a.E || f >= a.E) continue;
      to[int64_t{e} * a.E + f] = total[i][j];
      if (rest > 0) to[int64_t{f} * a.E + e] = total[i][j];
    }
}

}  // namespace

void add_logit_gram(const RouterStats& args, cudaStream_t stream) {
  const int64_t E = args.E, chunks = parts(args.T, kChunk), size = std::max<int64_t>(1, E * E * sizeof(double));
  const int64_t most = std::max<int64_t>(1, std::min(kSlices, kBytes / size));
  const int64_t each = parts(chunks, most) * kChunk, slices = parts(args.T, each), tiles = parts(E, kTile);
  const Scratch<double> sums(slices * E * E, stream);
  const Gram a{args.logits, args.mask, args.T, each, static_cast<int>(E)};
  launch(gram_kernel, blocks(tiles * (tiles + 1) / 2, slices), kThreads, 0, stream, a, static_cast<int>(tiles), sums);
  add_rows<double>(sums, slices, E * E, args.logit_gram, stream);
}

}  // namespace moekern::cuda
