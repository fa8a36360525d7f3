#include <algorithm>

#include "../kernels.h"
#include "dimensions.h"
#include "parallel.h"
#include "rows.h"
#include "slots.h"
#include "turn.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kTokens = 16;     // tokens a task combines
constexpr int64_t kColumns = 128;   // of the output, whose float32 sums stay in L1 while the token's rows are added
constexpr int kAtOnce = 2;          // rows that are added while a sum is in a register
constexpr int64_t kAhead = 2;        // tokens before a row is needed, it is fetched: rows lie far apart, a page or more each

// Where each slot's row is, and what the first pass leaves for the second.
struct Routing {
  std::vector<int32_t> ids;     // [T, K], -1: empty
  std::vector<float> gates;     // [T, K]
  std::vector<int64_t> row_of;  // [T, K], -1: empty
  std::vector<float> square;    // [N] sum of the row's squares
  std::vector<float> top;       // [N] largest |y|
  std::vector<double> gated;    // [T, K] gate x norm, 0 for empty slots
  std::vector<double> turn;     // [T] 1 - cos(h, h + out) where the residual h was given
};

Routing read_routing(const CombineAndMeasure& args) {
  const int64_t slots = args.T * args.K, N = args.N;
  Routing routing;
  routing.ids.resize(slots);
  routing.gates.resize(slots);
  routing.square.resize(N);
  routing.top.resize(N);
  routing.gated.resize(slots);
  routing.turn.resize(args.residual ? args.T : 0);
  read_ids(args.idx, 0, slots, args.E, routing.ids.data());
  read_floats(args.weight, 0, slots, routing.gates.data());
  routing.row_of = rows_of_slots(routing.ids, args.order, args.offsets, args.E, N);
  return routing;
}

// Running sums of squares and largest magnitudes of one row. Blocks of columns take turns at two times 16 lanes.
template <class T>
struct Measure {
  struct Part {
    Floats a = {}, b = {};
    Top<T> top;
  } parts[2];
};

// The n filled slots of one token in slot order, of K at most.
template <class T>
struct Filled {
  explicit Filled(int64_t K) : rows(K), next(K), slots(K), gates(K), measures(K) {}
  int64_t n = 0;
  std::vector<const T*> rows, next;  // next: rows of the token kAhead on
  std::vector<int64_t> slots;
  std::vector<float> gates;
  std::vector<Measure<T>> measures;
};

template <class T>
MOEKERN_INLINE void find_rows(const CombineAndMeasure& args, const T* y, int64_t t, const Routing& routing,
                              Filled<T>& f) {
  const int64_t ahead = std::min(t + kAhead, args.T - 1) * args.K;
  f.n = 0;
  for (int64_t k = 0; k < args.K; ++k) {
    const int64_t slot = t * args.K + k, row = routing.row_of[slot], next = routing.row_of[ahead + k];
    if (row < 0) continue;
    f.rows[f.n] = y + row * args.H;
    f.next[f.n] = next < 0 ? f.rows[f.n] : y + next * args.H;
    f.slots[f.n] = slot;
    f.gates[f.n++] = routing.gates[slot];
  }
}

// 32 columns that are read soon.
template <class T>
MOEKERN_INLINE void fetch(const T* y) {
  prefetch(y);
  if (sizeof(T) == 4) prefetch(y + kLanes / 2);
}

// kTogether rows join 16 columns of the output's sums one after the other, and their own lanes.
template <int kTogether, bool kFirst, class T>
MOEKERN_INLINE void add_rows(const T* const* y, int64_t at, const float* gates, float* sum,
                             typename Measure<T>::Part* parts) {
  Floats sum_a = {}, sum_b = {};
  if (!kFirst) {
    sum_a = read<Floats>(sum);
    sum_b = read<Floats>(sum + kVector);
  }
  for (int r = 0; r < kTogether; ++r) {
    Floats a, b;
    unpack(y[r] + at, a, b);
    sum_a += gates[r] * a;
    sum_b += gates[r] * b;
    parts[r].a += a * a;
    parts[r].b += b * b;
    parts[r].top.add(y[r] + at);
  }
  pack(sum_a, sum_b, sum);
}

// Up to kColumns columns of kTogether rows join the output's sums, which lie as unpacked.
template <int kTogether, bool kFirst, class T>
MOEKERN_INLINE void add_columns(const Filled<T>& f, int64_t k, int64_t start, int64_t n, float* sum,
                                Measure<T>* measures) {
  typename Measure<T>::Part parts[kTogether];
  const T* rows[kTogether];
  float gates[kTogether];
  const int turn = start / kColumns % 2;
  for (int r = 0; r < kTogether; ++r) {
    parts[r] = measures[k + r].parts[turn];
    rows[r] = f.rows[k + r] + start;
    gates[r] = f.gates[k + r];
  }
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int r = 0; r < kTogether; ++r) fetch(f.next[k + r] + start + i);
    add_rows<kTogether, kFirst>(rows, i, gates, sum + i, parts);
    add_rows<kTogether, kFirst>(rows, i + kLanes / 2, gates, sum + i + kLanes / 2, parts);
  }
  if (i < n) {
    T tails[kTogether][kLanes] = {};
    for (int r = 0; r < kTogether; ++r) {
      std::memcpy(tails[r], rows[r] + i, (n - i) * sizeof(T));
      rows[r] = tails[r];
    }
    add_rows<kTogether, kFirst>(rows, 0, gates, sum + i, parts);
    add_rows<kTogether, kFirst>(rows, kLanes / 2, gates, sum + i + kLanes / 2, parts);
  }
  for (int r = 0; r < kTogether; ++r) measures[k + r].parts[turn] = parts[r];
}

template <class T>
MOEKERN_INLINE void round_columns(const float* sum, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + 2 * kVector <= n; i += 2 * kVector)
    pack(read<Floats>(sum + i), read<Floats>(sum + i + kVector), out + i);
  if (i == n) return;
  T tail[2 * kVector];
  pack(read<Floats>(sum + i), read<Floats>(sum + i + kVector), tail);
  std::memcpy(out + i, tail, (n - i) * sizeof(T));
}

// Rows of a token take turns every kColumns columns: the prefetches are spread over all the rows to come.
template <class T>
MOEKERN_INLINE void combine_token(const CombineAndMeasure& args, int64_t t, Routing& routing, Filled<T>& f) {
  const int64_t H = args.H, filled = f.n;
  std::fill(f.measures.begin(), f.measures.begin() + filled, Measure<T>{});
  T* out = static_cast<T*>(args.out) + t * H;
  for (int64_t start = 0; start < H; start += kColumns) {
    const int64_t n = std::min(kColumns, H - start);
    float sum[kColumns];
    if (filled == 0) std::memset(sum, 0, sizeof sum);
    Measure<T>* measures = f.measures.data();
    int64_t k = std::min<int64_t>(filled, kAtOnce);
    if (filled >= kAtOnce) add_columns<kAtOnce, true>(f, 0, start, n, sum, measures);
    if (filled == 1) add_columns<1, true>(f, 0, start, n, sum, measures);
    for (; k + kAtOnce <= filled; k += kAtOnce) add_columns<kAtOnce, false>(f, k, start, n, sum, measures);
    if (k < filled) add_columns<1, false>(f, k, start, n, sum, measures);
    round_columns(sum, n, out + start);
  }
  for (int64_t k = 0; k < filled; ++k) {
    const auto& [first, second] = f.measures[k].parts;
    const int64_t slot = f.slots[k], row = routing.row_of[slot];
    const float square = sum_of_lanes((first.a + second.a) + (first.b + second.b));
    routing.square[row] = square;
    routing.top[row] = first.top.joined(second.top).largest();
    routing.gated[slot] = static_cast<double>(f.gates[k]) * std::sqrt(static_cast<double>(square));
  }
}

// One expert's scalars in row order, and its pairs with experts of a higher number, mirrored.
void add_expert(const CombineAndMeasure& args, const Routing& routing, int64_t e, std::vector<double>& pairs) {
  const int64_t K = args.K, E = args.E;
  double norms = args.norm_sum[e], squares = args.norm_square_sum[e], gates = args.gated_norm_sum[e];
  double gated_squares = args.gated_norm_square_sum[e], most = args.max_abs[e], own = args.pair_sum[e * E + e];
  double turned = args.residual_sum[e];
  std::fill(pairs.begin(), pairs.end(), 0.0);
  for (int64_t n = args.offsets[e]; n < args.offsets[e + 1]; ++n) {
    const int64_t slot = args.order[n], t = slot / K;
    if (args.mask && !args.mask[t]) continue;
    const double square = routing.square[n], gated = routing.gated[slot], top = routing.top[n];
    norms += std::sqrt(square);
    squares += square;
    gates += gated;
    gated_squares += gated * gated;
    most = top <= most || most != most ? most : top;  // a NaN stays
    own += gated * gated;
    if (args.residual) turned += gated * routing.turn[t];
    for (int64_t k = t * K; k < (t + 1) * K; ++k)
      if (routing.ids[k] > e) pairs[routing.ids[k]] += gated * routing.gated[k];
  }
  args.norm_sum[e] = norms;
  args.norm_square_sum[e] = squares;
  args.gated_norm_sum[e] = gates;
  args.gated_norm_square_sum[e] = gated_squares;
  args.max_abs[e] = most;
  args.pair_sum[e * E + e] = own;
  args.residual_sum[e] = turned;
  for (int64_t j = e + 1; j < E; ++j) {
    args.pair_sum[e * E + j] += pairs[j];
    args.pair_sum[j * E + e] += pairs[j];
  }
}

template <class T>
void run_all(const CombineAndMeasure& args, const T* y, const Run& run) {
  const Level level = level_of(run.level);
  Routing routing = read_routing(args);

  const int64_t tasks = (args.T + kTokens - 1) / kTokens;
  std::vector<Filled<T>> filled(workers_for(tasks, run.threads), Filled<T>(args.K));
  parallel_for(tasks, run.threads, [&](int64_t task, int worker) {
    const int64_t stop = std::min(args.T, (task + 1) * kTokens);
    at_level(level, [&]() __attribute__((always_inline)) {
      for (int64_t t = task * kTokens; t < stop; ++t) {
        find_rows(args, y, t, routing, filled[worker]);
        combine_token(args, t, routing, filled[worker]);
        if (args.residual) routing.turn[t] = turn_of<T>(args, t);
      }
    });
  });

  std::vector<std::vector<double>> pairs(workers_for(args.E, run.threads), std::vector<double>(args.E));
  parallel_for(args.E, run.threads, [&](int64_t e, int worker) { add_expert(args, routing, e, pairs[worker]); });

  if (args.residual)
    for (int64_t t = 0; t < args.T; ++t) *args.residual_tokens += !args.mask || args.mask[t];

  if (!args.square_sum) return;
  const int64_t blocks = (args.H + kDimensions - 1) / kDimensions;
  std::vector<Chunk<T>> chunks(workers_for(args.E * blocks, run.threads));
  parallel_for(args.E * blocks, run.threads, [&](int64_t task, int worker) {
    const int64_t e = task / blocks, start = task % blocks * kDimensions;
    for (int64_t first = args.offsets[e]; first < args.offsets[e + 1]; first += kRows) {
      find_chunk(args, y, routing.square.data(), first, std::min(first + kRows, args.offsets[e + 1]), chunks[worker]);
      at_level(level, [&]() __attribute__((always_inline)) { add_dimensions(args, chunks[worker], y, e, start); });
    }
  });
}

}  // namespace

void combine_and_measure(const CombineAndMeasure& args, const Run& run) {
  with_floats(args.y, [&](const auto* y) { run_all(args, y, run); });
}

}  // namespace moekern::cpu
