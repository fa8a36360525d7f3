#include <algorithm>

#include "../kernels.h"
#include "parallel.h"
#include "slots.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kTokens = 16;     // tokens a task combines
constexpr int64_t kColumns = 256;   // of the output, whose float32 sums stay in L1 while the token's rows are added
constexpr int64_t kAhead = 2;        // tokens before a row is needed, it is fetched: rows lie far apart, a page or more each
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

  bool rising = args.offsets[0] == 0 && args.offsets[args.E] == N;
  for (int64_t e = 0; e < args.E; ++e) rising = rising && args.offsets[e] <= args.offsets[e + 1];
  if (!rising) throw ArgumentError("offsets", "expected offsets rising from 0 to " + std::to_string(N));
  for (int64_t e = 0; e < args.E; ++e)
    for (int64_t n = args.offsets[e]; n < args.offsets[e + 1]; ++n) {
      const int64_t slot = args.order[n];
      if (slot < 0 || slot >= slots || routing.ids[slot] != e || routing.row_of[slot] >= 0)
        throw ArgumentError("order", "expected each slot of expert " + std::to_string(e) + " once, got slot " +
                                         std::to_string(slot) + " in row " + std::to_string(n));
      routing.row_of[slot] = n;
    }
  const int64_t filled = slots - std::count(routing.ids.begin(), routing.ids.end(), -1);
  if (filled != N)
    throw ArgumentError("order", "expected a row for each of " + std::to_string(filled) + " slots, got " +
                                     std::to_string(N));
  return routing;
}

// Running sums of squares and largest magnitudes of one row: 32 lanes, as two times 16 unpacked columns.
template <class T>
struct Measure {
  struct Part {
    Floats a = {}, b = {};
    Top<T> top;
  } first, second;
};

// The filled slots of one token in slot order.
template <class T>
struct Filled {
  std::vector<const T*> rows, next;  // next: rows of the token kAhead on
  std::vector<int64_t> slots;
  std::vector<Measure<T>> measures;
};

template <class T>
void find_rows(const CombineAndMeasure& args, const T* y, int64_t t, const Routing& routing, Filled<T>& f) {
  f.rows.clear();
  f.slots.clear();
  for (int64_t slot = t * args.K; slot < (t + 1) * args.K; ++slot)
    if (routing.row_of[slot] >= 0) {
      f.rows.push_back(y + routing.row_of[slot] * args.H);
      f.slots.push_back(slot);
    }
  f.next = f.rows;
  size_t n = 0;
  const int64_t ahead = std::min(t + kAhead, args.T), stop = std::min(ahead + 1, args.T);
  for (int64_t slot = ahead * args.K; slot < stop * args.K && n < f.next.size(); ++slot)
    if (routing.row_of[slot] >= 0) f.next[n++] = y + routing.row_of[slot] * args.H;
}

template <class T>
MOEKERN_INLINE void add_part(const T* y, float gate, float* sum, typename Measure<T>::Part& part) {
  Floats a, b;
  unpack(y, a, b);
  pack(read<Floats>(sum) + gate * a, read<Floats>(sum + kVector) + gate * b, sum);
  part.a += a * a;
  part.b += b * b;
  part.top.add(y);
}

template <class T>
MOEKERN_INLINE void add_lanes(const T* y, float gate, float* sum, Measure<T>& m) {
  add_part(y, gate, sum, m.first);
  add_part(y + kLanes / 2, gate, sum + kLanes / 2, m.second);
}

// Up to kColumns columns of one row join the output's sums, which lie as unpacked, and the row's own lanes.
template <class T>
MOEKERN_INLINE void add_columns(const T* y, const T* next, int64_t n, float gate, float* sum, Measure<T>& measure) {
  Measure<T> m = measure;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(next + i);
    if (sizeof(T) == 4) prefetch(next + i + kLanes / 2);
    add_lanes(y + i, gate, sum + i, m);
  }
  if (i < n) {
    T tail[kLanes] = {};
    std::memcpy(tail, y + i, (n - i) * sizeof(T));
    add_lanes(tail, gate, sum + i, m);
  }
  measure = m;
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
  const int64_t H = args.H;
  const size_t filled = f.rows.size();
  std::fill(f.measures.begin(), f.measures.begin() + filled, Measure<T>{});
  T* out = static_cast<T*>(args.out) + t * H;
  for (int64_t start = 0; start < H; start += kColumns) {
    const int64_t n = std::min(kColumns, H - start);
    float sum[kColumns] = {};
    for (size_t k = 0; k < filled; ++k)
      add_columns(f.rows[k] + start, f.next[k] + start, n, routing.gates[f.slots[k]], sum, f.measures[k]);
    round_columns(sum, n, out + start);
  }
  for (size_t k = 0; k < filled; ++k) {
    const Measure<T>& m = f.measures[k];
    const int64_t slot = f.slots[k], row = routing.row_of[slot];
    float lane[kLanes];
    in_order(m.first.a, m.first.b, lane, out);
    in_order(m.second.a, m.second.b, lane + kLanes / 2, out);
    const float square = sum_of(lane), top = m.first.top.largest(), other = m.second.top.largest();
    routing.square[row] = square;
    routing.top[row] = top > other || top != top ? top : other;
    routing.gated[slot] = static_cast<double>(routing.gates[slot]) * std::sqrt(static_cast<double>(square));
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

// The sums lie as unpacked; columns that are less than a step are the block's last.
template <class T>
MOEKERN_INLINE void add_squares(const T* y, const T* next, int64_t n, float* sum) {
  for (int64_t i = 0; i < n; i += 2 * kVector) {
    prefetch(next + i);
    Floats a, b;
    if (i + 2 * kVector <= n) {
      unpack(y + i, a, b);
    } else {
      T tail[2 * kVector] = {};
      std::memcpy(tail, y + i, (n - i) * sizeof(T));
      unpack(tail, a, b);
    }
    pack(read<Floats>(sum + i) + a * a, read<Floats>(sum + i + kVector) + b * b, sum + i);
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
    for (int64_t row = first; row < stop; ++row) {
      const T* at = y + row * H + start;
      if (!args.mask || args.mask[args.order[row] / args.K]) add_squares(at, row + 1 < args.N ? at + H : at, n, sum);
    }
    for (int64_t i = 0; i < n; i += 2 * kVector) {
      float column[2 * kVector];
      in_order(read<Floats>(sum + i), read<Floats>(sum + i + kVector), column, y);
      for (int64_t j = 0; j < std::min<int64_t>(2 * kVector, n - i); ++j) total[i + j] += column[j];
    }
  }
}

template <class T>
void run_all(const CombineAndMeasure& args, const T* y, const Run& run) {
  const Level level = level_of(run.level);
  Routing routing = read_routing(args);

  const int64_t tasks = (args.T + kTokens - 1) / kTokens;
  std::vector<Filled<T>> filled(workers_for(tasks, run.threads));
  for (Filled<T>& f : filled) f.measures.resize(args.K);
  parallel_for(tasks, run.threads, [&](int64_t task, int worker) {
    const int64_t stop = std::min(args.T, (task + 1) * kTokens);
    for (int64_t t = task * kTokens; t < stop; ++t) {
      find_rows(args, y, t, routing, filled[worker]);
      at_level(level, [&]() __attribute__((always_inline)) { combine_token(args, t, routing, filled[worker]); });
    }
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
