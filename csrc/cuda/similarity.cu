// Inner products of the rows of all experts on the same tokens: tiles of each token's products side by side, then each
// pair adds its tokens in order.
#include "block.h"
#include "tiles.h"

namespace moekern::cuda {
namespace {

constexpr int64_t kGroupBytes = 32 << 20;  // of float32 products that wait to be added; about what the L2 cache holds
constexpr int kMostTokens = 65535;         // of a group: a grid's second dimension
constexpr int kThreads = 256;

struct Group {
  Similarity args;
  int64_t first, tokens;  // of this group
  int tiles_a_side;
  float* products;  // [tokens, tiles, kTile, kTile]
  double* square;   // [tokens, E]
  double* inverse;  // [tokens, E]: one over the norm, 0 for rows of zeros
};

template <class T, int kTile, int kEach>
__global__ void multiply_tokens(Group group, const T* y) {
  using Mine = Owned<kTile, kEach>;
  __shared__ Side<kTile> sides[2];
  const Similarity& args = group.args;
  const int64_t i = blockIdx.y, t = group.first + i;
  if (args.mask && !args.mask[t]) return;
  int tile_row, tile_column;
  tile_at(blockIdx.x, group.tiles_a_side, tile_row, tile_column);
  const auto row_of = [&](int tile) {
    return [=](int r) {
      const int64_t e = static_cast<int64_t>(tile) * kTile + r;
      return e < args.E ? y + (e * args.T + t) * args.H : nullptr;
    };
  };
  const bool diagonal = tile_row == tile_column;
  const Side<kTile>& other = sides[diagonal ? 0 : 1];
  const int row_line = threadIdx.x / Mine::kLines, column_line = threadIdx.x % Mine::kLines;
  Products<kTile, kEach> products;
  Carried<T, kTile> a, b;
  a.fetch(row_of(tile_row), 0, args.H);
  if (!diagonal) b.fetch(row_of(tile_column), 0, args.H);
  for (int64_t c = 0; c < args.H; c += kDepth) {
    __syncthreads();
    a.put(sides[0]);
    if (!diagonal) b.put(sides[1]);
    __syncthreads();
    a.fetch(row_of(tile_row), c + kDepth, args.H);
    if (!diagonal) b.fetch(row_of(tile_column), c + kDepth, args.H);
    products.add_columns(sides[0], other, row_line, column_line);
    if ((c + kDepth) % kChain == 0 || c + kDepth >= args.H) products.end_chain();
  }

  float* to = group.products + (i * gridDim.x + blockIdx.x) * kTile * kTile;
  for (int r = 0; r < kEach; ++r)
    for (int j = 0; j < kEach; ++j)
      to[Mine::at(row_line, r) * kTile + Mine::at(column_line, j)] = products.total[r][j];
  if (!diagonal || row_line != column_line) return;
  for (int r = 0; r < kEach; ++r) {
    const int64_t e = static_cast<int64_t>(tile_row) * kTile + Mine::at(row_line, r);
    if (e >= args.E) continue;
    const double own = args.norm_square ? args.norm_square[e * args.T + t] : products.total[r][r];
    group.square[i * args.E + e] = own;
    group.inverse[i * args.E + e] = own == 0 ? 0 : 1 / sqrt(own);
  }
}

// Each thread adds the tokens of one pair in their order, however they are divided into groups and calls.
template <int kTile>
__global__ void add_tokens(Group group) {
  const Similarity& args = group.args;
  int tile_row, tile_column;
  tile_at(blockIdx.x, group.tiles_a_side, tile_row, tile_column);
  const int place = blockIdx.y * blockDim.x + threadIdx.x;
  const int64_t i = static_cast<int64_t>(tile_row) * kTile + place / kTile;
  const int64_t j = static_cast<int64_t>(tile_column) * kTile + place % kTile;
  if (j >= args.E || i > j) return;
  double gram = args.gram_sum[i * args.E + j], cosine = args.cosine_sum[i * args.E + j];
  const float* product = group.products + static_cast<int64_t>(blockIdx.x) * kTile * kTile + place;
  for (int64_t n = 0; n < group.tokens; ++n, product += static_cast<int64_t>(gridDim.x) * kTile * kTile) {
    if (args.mask && !args.mask[group.first + n]) continue;
    const double *square = group.square + n * args.E, *inverse = group.inverse + n * args.E;
    if (i == j) {
      gram += square[i];
      cosine += square[i] == 0 ? 0 : square[i] / square[i];
    } else {
      const double v = *product;
      gram += v;
      cosine += v * inverse[i] * inverse[j];
    }
  }
  args.gram_sum[i * args.E + j] = args.gram_sum[j * args.E + i] = gram;
  args.cosine_sum[i * args.E + j] = args.cosine_sum[j * args.E + i] = cosine;
}

__global__ void count_tokens(const bool* mask, int64_t T, int64_t* tokens) {
  int64_t mine = 0;
  for (int64_t t = threadIdx.x; t < T && mask; t += kThreads) mine += mask[t];
  const int64_t counted = block_sum<kThreads>(mine);
  if (threadIdx.x == 0) *tokens += mask ? counted : T;
}

template <int kTile, int kEach>
void add_groups(const Similarity& args, cudaStream_t stream) {
  const int64_t a_side = parts(args.E, kTile), tiles = a_side * (a_side + 1) / 2, size = tiles * kTile * kTile;
  const int64_t fit = std::max<int64_t>(kGroupBytes / (sizeof(float) * size), 1);
  const int64_t tokens = std::min({args.T, fit, int64_t{kMostTokens}});
  const Scratch<float> products(tokens * size, stream);
  const Scratch<double> square(tokens * args.E, stream), inverse(tokens * args.E, stream);
  Group group{args, 0, 0, static_cast<int>(a_side), products, square, inverse};
  for (; group.first < args.T; group.first += tokens) {
    group.tokens = std::min(tokens, args.T - group.first);
    with_floats(args.y, [&](const auto* y) {
      using T = std::decay_t<decltype(*y)>;
      launch(multiply_tokens<T, kTile, kEach>, blocks(tiles, group.tokens), kTileThreads, 0, stream, group, y);
    });
    launch(add_tokens<kTile>, blocks(tiles, parts(kTile * kTile, kThreads)), kThreads, 0, stream, group);
  }
}

}  // namespace

void similarity(const Similarity& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  launch(count_tokens, blocks(1), kThreads, 0, stream, args.mask, args.T, args.tokens);
  if (args.E == 0 || args.T == 0) return;
  if (args.E <= 16) return add_groups<16, 2>(args, stream);
  if (args.E <= 32) return add_groups<32, 4>(args, stream);
  add_groups<64, 8>(args, stream);
}

}  // namespace moekern::cuda
