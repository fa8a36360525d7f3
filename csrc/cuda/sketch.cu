// Random projections of rows: a block's signs are drawn where they are needed, so no projection lies in memory.
#include <cmath>

#include "tiles.h"

namespace moekern::cuda {
namespace {

constexpr int kTile = 64, kEach = 8;
constexpr int64_t kSketchTokens = kTile;  // tokens that share a projection; part of the meaning of `sketch`
using Mine = Owned<kTile, kEach>;

// The finaliser of SplitMix64: a bijection whose outputs for a counter pass as random bits.
__device__ uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// 64 sums of the projection for the tokens of one chunk and one expert. Thread n draws row n of the projection, a word
// for 64 columns, and in the first tile adds up the squares of the expert's n-th row.
template <class T>
__global__ void project(Sketch args, const T* y, int64_t chunks, int64_t tiles, float scale) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  static_assert(kChain == 64, "a word of signs is drawn a chain");
  __shared__ Side<kTile> rows, signs;
  const int64_t tile = blockIdx.x % tiles, e = blockIdx.x / tiles / chunks;
  const int64_t chunk = args.start / kSketchTokens + blockIdx.x / tiles % chunks;
  const int64_t before = chunk * kSketchTokens - args.start, first = before > 0 ? before : 0;
  const int64_t stop = before + kSketchTokens, tokens = (stop < args.T ? stop : args.T) - first;
  const int64_t row = e * args.T + first, m = tile * kTile + threadIdx.x, words = (args.H + 63) / 64;
  const uint64_t key = mixed(static_cast<uint64_t>(args.seed) + static_cast<uint64_t>(chunk + 1) * kGolden);
  const int row_line = threadIdx.x / Mine::kLines, column_line = threadIdx.x % Mine::kLines;
  const auto row_at = [&](int r) { return r < tokens ? y + (row + r) * args.H : nullptr; };

  Products<kTile, kEach> products;
  Carried<T, kTile> carried;
  uint64_t word = 0;
  float squares = 0, square = 0;
  carried.fetch(row_at, 0, args.H);
  for (int64_t c = 0; c < args.H; c += kDepth) {
    if (c % 64 == 0) word = mixed(key + static_cast<uint64_t>(m * words + c / 64 + 1) * kGolden);
    __syncthreads();
    carried.put(rows);
    for (int k = 0; k < kDepth; ++k, word >>= 1) signs.at[k * signs.kStride + threadIdx.x] = word & 1 ? 1.0f : -1.0f;
    __syncthreads();
    carried.fetch(row_at, c + kDepth, args.H);
    products.add_columns(rows, signs, row_line, column_line);
    if (tile == 0)
      for (int k = 0; k < kDepth; ++k) {
        const float v = rows.at[k * rows.kStride + threadIdx.x];
        squares = fmaf(v, v, squares);
      }
    if ((c + kDepth) % kChain != 0 && c + kDepth < args.H) continue;
    products.end_chain();
    square += squares;
    squares = 0;
  }

  for (int r = 0; r < kEach; ++r)
    for (int j = 0; j < kEach; ++j) {
      const int64_t to = Mine::at(row_line, r), column = tile * kTile + Mine::at(column_line, j);
      if (to < tokens && column < args.M) args.z[(row + to) * args.M + column] = products.total[r][j] * scale;
    }
  if (tile == 0 && threadIdx.x < tokens) args.norm_square[row + threadIdx.x] = square;
}

}  // namespace

void sketch(const Sketch& args, void* stream) {
  if (args.E == 0 || args.T == 0) return;
  const int64_t chunks = (args.start + args.T - 1) / kSketchTokens - args.start / kSketchTokens + 1;
  const int64_t tiles = parts(args.M, kTile);
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(args.M)));
  with_floats(args.y, [&](const auto* y) {
    using T = std::decay_t<decltype(*y)>;
    launch(project<T>, blocks(args.E * chunks * tiles), kTileThreads, 0, static_cast<cudaStream_t>(stream), args, y,
           chunks, tiles, scale);
  });
}

}  // namespace moekern::cuda
