#include <algorithm>

#include "../kernels.h"
#include "parallel.h"
#include "slots.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kTokens = 16;     // tokens a task combines
constexpr int64_t kSquares = 2048;  // columns of square_sum a task adds to, so that the float32 sums stay in L1
constexpr int64_t kRows = 256;      // rows whose squares are summed in float32 before they join the float64 sum

// Where each slot's row is, and what the first pass leaves for the second.
struct Routing {
  std::vector<int32_t> ids;     // [T, K], -1: empty
  std::vector<float> gates;     // [T, K]
  std::vector<int64_t> row_of;  // [T, K], -1: empty
  std::vector<float> square;    // [N] sum of the row's squares
  std::vector<float> top;       // [N] largest |y|
  std::vector<double> gated;    // [T, K] gate x norm, 0 for empty slots
};

Routing read_routing(const CombineAndMeasure& args) {
  const int64_t slots = args.T * args.K, N = args.N;
  Routing routing;
  routing.ids.resize(slots);
  routing.gates.resize(slots);
  routing.row_of.assign(slots, -1);
  routing.square.resize(N);
  routing.top.resize(N);
  routing.gated.resize(slots);
  read_ids(args.idx, 0, slots, args.E, routing.ids.data());
  read_floats(args.weight, 0, slots, routing.gates.data());

  bool rising = args.offsets[0] == 0 && args.offsets[args.E] <= N;
  for (int64_t e = 0; e < args.E; ++e) rising = rising && args.offsets[e] <= args.offsets[e + 1];
  if (!rising) throw ArgumentError("offsets", "expected offsets rising from 0 to at most " + std::to_string(N));
  for (int64_t e = 0; e < args.E; ++e)
    for (int64_t n = args.offsets[e]; n < args.offsets[e + 1]; ++n) {
      const int64_t slot = args.order[n];
      if (slot < 0 || slot >= slots || routing.ids[slot] != e || routing.row_of[slot] >= 0)
        throw ArgumentError("order", "expected each slot of expert " + std::to_string(e) + " once, got slot " +
                                         std::to_string(slot) + " in row " + std::to_string(n));
      routing.row_of[slot] = n;
    }
  const int64_t filled = slots - std::count(routing.ids.begin(), routing.ids.end(), -1);
  if (filled != args.offsets[args.E])
    throw ArgumentError("offsets", "expected a row for each of " + std::to_string(filled) + " slots, got " +
                                       std::to_string(args.offsets[args.E]));
  return routing;
}

// Lanes of one row's running sum of squares and largest |y|. Bits of
// non-negative floats are ordered like integers, with NaN above all: no NaN is lost, and no comparison needs care.
struct Measure {
  float square[kLanes] = {};
  int32_t top[kLanes] = {};
};

template <class T>
MOEKERN_INLINE void add_lanes(const T* y, float gate, float* sum, float* square, int32_t* top) {
  for (int j = 0; j < kLanes; ++j) {
    const float v = load(y[j]);
    sum[j] += gate * v;
    square[j] += v * v;
    top[j] = std::max(top[j], bit_cast<int32_t>(v) & 0x7FFFFFFF);
  }
}

// Row numbers of one token's filled slots and the slots themselves, in slot order.
struct Filled {
  std::vector<int64_t> rows, slots;
  std::vector<float> gates;
  std::vector<Measure> measures;
};

// All rows of a token side by side, 32 columns at a time: they lie far apart, and reading them in turns keeps a
// prefetcher busy on each. Gathering 8 rows so reached twice the bandwidth of one row after the other.
template <class T>
MOEKERN_INLINE void combine_token(const CombineAndMeasure& args, const T* y, int64_t t, Routing& routing, Filled& f) {
  const int64_t H = args.H;
  f.rows.clear();
  f.slots.clear();
  f.gates.clear();
  for (int64_t slot = t * args.K; slot < (t + 1) * args.K; ++slot)
    if (routing.row_of[slot] >= 0) {
      f.rows.push_back(routing.row_of[slot]);
      f.slots.push_back(slot);
      f.gates.push_back(routing.gates[slot]);
    }
  const size_t filled = f.rows.size();
  std::fill(f.measures.begin(), f.measures.begin() + filled, Measure{});
  T* out = static_cast<T*>(args.out) + t * H;
  int64_t i = 0;
  for (; i + kLanes <= H; i += kLanes) {
    float sum[kLanes] = {};
    for (size_t k = 0; k < filled; ++k) {
      Measure& m = f.measures[k];
      add_lanes(y + f.rows[k] * H + i, f.gates[k], sum, m.square, m.top);
    }
    for (int j = 0; j < kLanes; ++j) store(sum[j], out + i + j);
  }
  if (i < H) {
    float sum[kLanes] = {};
    for (size_t k = 0; k < filled; ++k) {
      T tail[kLanes] = {};
      std::memcpy(tail, y + f.rows[k] * H + i, (H - i) * sizeof(T));
      add_lanes(tail, f.gates[k], sum, f.measures[k].square, f.measures[k].top);
    }
    for (int64_t j = 0; j < H - i; ++j) store(sum[j], out + i + j);
  }
  for (size_t k = 0; k < filled; ++k) {
    const float square = sum_of(f.measures[k].square);
    routing.square[f.rows[k]] = square;
    routing.top[f.rows[k]] = bit_cast<float>(*std::max_element(f.measures[k].top, f.measures[k].top + kLanes));
    routing.gated[f.slots[k]] = static_cast<double>(routing.gates[f.slots[k]]) * std::sqrt(static_cast<double>(square));
  }
}

// One expert's scalars in row order, and its pairs with experts of a higher number, mirrored.
void add_expert(const CombineAndMeasure& args, const Routing& routing, int64_t e, std::vector<double>& pairs) {
  const int64_t K = args.K, E = args.E;
  std::fill(pairs.begin(), pairs.end(), 0.0);
  for (int64_t n = args.offsets[e]; n < args.offsets[e + 1]; ++n) {
    const int64_t slot = args.order[n], t = slot / K;
    if (args.mask && !args.mask[t]) continue;
    const double square = routing.square[n], norm = std::sqrt(square), gated = routing.gated[slot];
    args.norm_sum[e] += norm;
    args.norm_square_sum[e] += square;
    args.gated_norm_sum[e] += gated;
    args.gated_norm_square_sum[e] += gated * gated;
    const double top = routing.top[n], before = args.max_abs[e];
    args.max_abs[e] = top <= before || before != before ? before : top;  // a NaN stays
    for (int64_t k = t * K; k < (t + 1) * K; ++k)
      if (routing.ids[k] > e) pairs[routing.ids[k]] += gated * routing.gated[k];
    args.pair_sum[e * E + e] += gated * gated;
  }
  for (int64_t j = e + 1; j < E; ++j) {
    args.pair_sum[e * E + j] += pairs[j];
    args.pair_sum[j * E + e] += pairs[j];
  }
}

template <class T>
MOEKERN_INLINE void add_squares(const T* y, int64_t n, float* sum) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = load(y[i]);
    sum[i] += v * v;
  }
}

// A block of columns of one expert's square_sum: its rows lie side by side, so this second read of y is sequential.
template <class T>
MOEKERN_INLINE void add_square_block(const CombineAndMeasure& args, const T* y, int64_t e, int64_t start) {
  const int64_t H = args.H, n = std::min(kSquares, H - start);
  double* total = args.square_sum + e * H + start;
  for (int64_t first = args.offsets[e]; first < args.offsets[e + 1]; first += kRows) {
    float sum[kSquares] = {};
    const int64_t stop = std::min(first + kRows, args.offsets[e + 1]);
    for (int64_t row = first; row < stop; ++row)
      if (!args.mask || args.mask[args.order[row] / args.K]) add_squares(y + row * H + start, n, sum);
    for (int64_t i = 0; i < n; ++i) total[i] += sum[i];
  }
}

template <class T>
void run_all(const CombineAndMeasure& args, const T* y, const Run& run) {
  const Level level = level_of(run.level);
  Routing routing = read_routing(args);

  const int64_t tasks = (args.T + kTokens - 1) / kTokens;
  std::vector<Filled> filled(workers_for(tasks, run.threads));
  for (Filled& f : filled) f.measures.resize(args.K);
  parallel_for(tasks, run.threads, [&](int64_t task, int worker) {
    const int64_t stop = std::min(args.T, (task + 1) * kTokens);
    at_level(level, [&]() __attribute__((always_inline)) {
      for (int64_t t = task * kTokens; t < stop; ++t) combine_token(args, y, t, routing, filled[worker]);
    });
  });

  std::vector<std::vector<double>> pairs(workers_for(args.E, run.threads), std::vector<double>(args.E));
  parallel_for(args.E, run.threads, [&](int64_t e, int worker) { add_expert(args, routing, e, pairs[worker]); });

  if (!args.square_sum) return;
  const int64_t blocks = (args.H + kSquares - 1) / kSquares;
  parallel_for(args.E * blocks, run.threads, [&](int64_t task, int) {
    at_level(level, [&]() __attribute__((always_inline)) {
      add_square_block(args, y, task / blocks, task % blocks * kSquares);
    });
  });
}

}  // namespace

void combine_and_measure(const CombineAndMeasure& args, const Run& run) {
  with_floats(args.y, [&](const auto* y) { run_all(args, y, run); });
}

}  // namespace moekern::cpu
