// Gram matrices of experts' activations and their products with residuals. One task has some columns of one expert's
// [A'A, A'R] and adds its chunks of rows in order, so threads and the division into tasks change no bit.
#include "grouped.h"
#include "parallel.h"
#include "products.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kFewColumns = 256, kManyColumns = 1024;  // of a task: 672 rows of the latter in float64 are 5 MB

// Which tiles of columns a task has: of A from `gram` to `gram_stop`, then of R likewise.
struct Task {
  int64_t e, gram, gram_stop, product, product_stop;
};

std::vector<Task> tasks_of(const ExpertGram& args, const Tile& tile, int threads) {
  const int64_t of_a = args.gram ? parts(args.M, tile.columns) : 0, of_r = parts(args.H, tile.columns);
  const int64_t all = of_a + of_r;
  const int64_t wanted = all * tile.columns * args.E / (4 * threads);
  const int64_t each = parts(std::clamp(wanted, kFewColumns, kManyColumns), tile.columns);
  std::vector<Task> tasks;
  for (int64_t e = 0; e < args.E; ++e)
    for (int64_t first = 0; first < all && args.offsets[e] < args.offsets[e + 1]; first += each) {
      const int64_t stop = std::min(first + each, all);
      tasks.push_back({e, std::min(first, of_a), std::min(stop, of_a), std::max(first - of_a, int64_t{0}),
                       std::max(stop - of_a, int64_t{0})});
    }
  return tasks;
}

// The rows of one expert that count, and where their residuals lie.
void find_rows(const ExpertGram& args, int64_t e, std::vector<const float*>& a, std::vector<const float*>& r) {
  a.clear();
  r.clear();
  for (int64_t n = args.offsets[e]; n < args.offsets[e + 1]; ++n) {
    if (args.mask && !args.mask[n]) continue;
    a.push_back(args.a + n * args.M);
    r.push_back(args.r + (args.tokens ? args.tokens[n] : n) * args.H);
  }
}

// to[i, j] += product[i, j] for `rows` rows and the columns from `from`, which may differ by row, to `columns`.
template <class From>
MOEKERN_INLINE void add_products(const float* product, int64_t stride, int64_t rows, const From& from, int64_t columns,
                                 double* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i, product += stride, to += to_stride)
    for (int64_t j = from(i); j < columns; ++j) to[j] += product[j];
}

class Work {
 public:
  Work(const ExpertGram& args, const Tile& tile, Level level)
      : args_(args), tile_(tile), level_(level), packed_(tile, args.M) {}

  void run(const Task& task) {
    find_rows(args_, task.e, a_, r_);
    const int64_t each = packed_rows(tile_, args_.M), rows = a_.size();
    for (int64_t first = 0; first < args_.M; first += each)
      for (int64_t row = 0; row < rows; row += kProductDepth)
        add_chunk(task, first, std::min(first + each, args_.M), row, std::min(kProductDepth, rows - row));
    if (!args_.gram) return;
    double* gram = args_.gram + task.e * args_.M * args_.M;
    for (int64_t j = task.gram * tile_.columns; j < std::min(task.gram_stop * tile_.columns, args_.M); ++j)
      for (int64_t i = 0; i < j; ++i) gram[j * args_.M + i] = gram[i * args_.M + j];
  }

 private:
  // Rows [first, stop) of the result, from `depth` rows of A and R.
  void add_chunk(const Task& task, int64_t first, int64_t stop, int64_t row, int64_t depth) {
    const int64_t M = args_.M, H = args_.H;
    for (int64_t i = first; i < stop; i += tile_.rows)
      pack(depth, tile_.rows, M - i, [&](int64_t k) { return a_[row + k] + i; }, packed_.a.at() + (i - first) * depth);
    double* product = args_.product + task.e * M * H;
    for (int64_t j = task.gram * tile_.columns; j < std::min(task.gram_stop * tile_.columns, M); j += tile_.columns) {
      const int64_t last = std::min(stop, j + tile_.columns);  // rows below the diagonal are copied in the end
      if (last <= first) continue;
      pack(depth, tile_.columns, M - j, [&](int64_t k) { return a_[row + k] + j; }, packed_.b.at());
      add_columns(first, last, depth, j, M, args_.gram + task.e * M * M, true);
    }
    for (int64_t j = task.product * tile_.columns; j < std::min(task.product_stop * tile_.columns, H);
         j += tile_.columns) {
      pack(depth, tile_.columns, H - j, [&](int64_t k) { return r_[row + k] + j; }, packed_.b.at());
      add_columns(first, stop, depth, j, H, product, false);
    }
  }

  // The tiles of the columns from j on: to [M, width].
  void add_columns(int64_t first, int64_t stop, int64_t depth, int64_t j, int64_t width, double* to, bool upper) {
    alignas(64) float product[kMostTile];
    for (int64_t i = first; i < stop; i += tile_.rows) {
      tile_.multiply(packed_.a.at() + (i - first) * depth, packed_.b.at(), depth, product);
      at_level(level_, [&]() __attribute__((always_inline)) {
        const auto from = [&](int64_t n) { return upper ? std::max<int64_t>(i + n - j, 0) : 0; };
        add_products(product, tile_.columns, std::min(tile_.rows, args_.M - i), from,
                     std::min(tile_.columns, width - j), to + i * width + j, width);
      });
    }
  }

  const ExpertGram& args_;
  const Tile tile_;
  const Level level_;
  Packed packed_;
  std::vector<const float*> a_, r_;
};

}  // namespace

void expert_gram(const ExpertGram& args, const Run& run) {
  const Level level = level_of(run.level);
  check_offsets(args.offsets, args.E, args.N);
  if (args.tokens) check_tokens(args.tokens, args.offsets[args.E], args.T);
  const Tile tile = tile_of(level);
  const std::vector<Task> tasks = tasks_of(args, tile, run.threads);
  std::vector<std::unique_ptr<Work>> work(workers_for(tasks.size(), run.threads));
  for (auto& one : work) one = std::make_unique<Work>(args, tile, level);
  parallel_for(tasks.size(), run.threads, [&](int64_t n, int worker) { work[worker]->run(tasks[n]); });
}

}  // namespace moekern::cpu
