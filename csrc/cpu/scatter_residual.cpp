// Taking what experts put out away from the rows of their tokens. A task has some columns of r, and goes through the
// experts in order.
#include "grouped.h"
#include "parallel.h"
#include "products.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kFewColumns = 128, kManyColumns = 1024;  // of a task

class Work {
 public:
  Work(const ScatterResidual& args, const Tile& tile, Level level)
      : args_(args), tile_(tile), level_(level), packed_(tile, longest(args)) {}

  // Columns [start, stop) of all rows.
  void run(int64_t start, int64_t stop) {
    for (int64_t e = 0; e < args_.E; ++e) {
      const int64_t last = args_.offsets[e + 1], each = packed_rows(tile_, last - args_.offsets[e]);
      for (int64_t first = args_.offsets[e]; first < last; first += each)
        for (int64_t channel = 0; channel < args_.M; channel += kProductDepth)
          subtract(e, first, std::min(first + each, last), channel, start, stop);
    }
  }

 private:
  static int64_t longest(const ScatterResidual& args) {
    int64_t rows = 0;
    for (int64_t e = 0; e < args.E; ++e) rows = std::max(rows, args.offsets[e + 1] - args.offsets[e]);
    return rows;
  }

  // What up to kProductDepth channels add to rows [first, last) of expert e.
  void subtract(int64_t e, int64_t first, int64_t last, int64_t channel, int64_t start, int64_t stop) {
    const int64_t depth = std::min(kProductDepth, args_.M - channel);
    for (int64_t n = first; n < last; n += tile_.rows)
      pack_rows(args_.a + n * args_.M + channel, std::min(tile_.rows, last - n), depth,
                packed_.a.at() + (n - first) * depth);
    const float* delta = args_.delta + (e * args_.M + channel) * args_.H;
    for (int64_t j = start; j < stop; j += tile_.columns) {
      pack(depth, tile_.columns, args_.H - j, [&](int64_t k) { return delta + k * args_.H + j; }, packed_.b.at());
      for (int64_t n = first; n < last; n += tile_.rows)
        subtract_tile(packed_.a.at() + (n - first) * depth, depth, n, std::min(n + tile_.rows, last), j);
    }
  }

  // Rows of a, transposed.
  void pack_rows(const float* rows, int64_t n, int64_t depth, float* to) {
    for (int64_t i = 0; i < tile_.rows; ++i, ++to) {
      const float* row = rows + i * args_.M;
      for (int64_t k = 0; k < depth; ++k) to[k * tile_.rows] = i < n ? row[k] : 0.0f;
    }
  }

  void subtract_tile(const float* a, int64_t depth, int64_t n, int64_t last, int64_t j) {
    alignas(64) float product[kMostTile];
    tile_.multiply(a, packed_.b.at(), depth, product);
    const int64_t columns = std::min(tile_.columns, args_.H - j);
    at_level(level_, [&]() __attribute__((always_inline)) {
      for (const float* from = product; n < last; ++n, from += tile_.columns) {
        float* to = args_.r + args_.tokens[n] * args_.H + j;
        for (int64_t i = 0; i < columns; ++i) to[i] -= from[i];
      }
    });
  }

  const ScatterResidual& args_;
  const Tile tile_;
  const Level level_;
  Packed packed_;
};

}  // namespace

void scatter_residual(const ScatterResidual& args, const Run& run) {
  const Level level = level_of(run.level);
  check_offsets(args.offsets, args.E, args.N);
  check_tokens(args.tokens, args.offsets[args.E], args.T);
  check_distinct(args.tokens, args.offsets, args.E, args.T);
  const Tile tile = tile_of(level);
  const int64_t wanted = std::clamp(args.H / (4 * run.threads), kFewColumns, kManyColumns);
  const int64_t each = parts(wanted, tile.columns) * tile.columns, tasks = parts(args.H, each);
  std::vector<std::unique_ptr<Work>> work(workers_for(tasks, run.threads));
  for (auto& one : work) one = std::make_unique<Work>(args, tile, level);
  parallel_for(tasks, run.threads,
               [&](int64_t n, int worker) { work[worker]->run(n * each, std::min((n + 1) * each, args.H)); });
}

}  // namespace moekern::cpu
