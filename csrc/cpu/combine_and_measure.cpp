#include <algorithm>

#include "../kernels.h"
#include "parallel.h"
#include "slots.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kTokens = 16;     // tokens a task combines
constexpr int64_t kColumns = 256;   // of the output, whose float32 sums stay in L1 while the token's rows are added
constexpr int64_t kAhead = 2;        // tokens before a row is needed, it is fetched: rows lie far apart, a page or more each
constexpr int64_t kDimensions = 1024;  // columns of an expert's sums a task adds to, so that these stay in L1
constexpr int64_t kRows = 256;         // rows that are summed in float32 before they join the float64 sums
constexpr int kTogether = 4;           // of these, rows that pass while a sum is in a register

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
  routing.row_of.assign(slots, -1);
  routing.square.resize(N);
  routing.top.resize(N);
  routing.gated.resize(slots);
  routing.turn.resize(args.residual ? args.T : 0);
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

// The lanes of three dots of two rows h and out.
struct Dots {
  Floats hh_a = {}, hh_b = {}, ho_a = {}, ho_b = {}, oo_a = {}, oo_b = {};
};

template <class T>
MOEKERN_INLINE void add_dots(const T* h, const T* out, Dots& dots) {
  Floats ha, hb, oa, ob;
  unpack(h, ha, hb);
  unpack(out, oa, ob);
  dots.hh_a += ha * ha;
  dots.hh_b += hb * hb;
  dots.ho_a += ha * oa;
  dots.ho_b += hb * ob;
  dots.oo_a += oa * oa;
  dots.oo_b += ob * ob;
}

template <class T>
MOEKERN_INLINE double sum_of_dots(const Floats& a, const Floats& b, const Floats& c, const Floats& d, const T* order) {
  float lane[kLanes];
  in_order(a, b, lane, order);
  in_order(c, d, lane + kLanes / 2, order);
  return sum_of(lane);
}

// 1 - cos(h, h + out), at least 0, from <h, h>, <h, out> and <out, out>. Where out is small the cosine is near 1: the
// determinant has what float32 has lost of it.
inline double turned(double hh, double ho, double oo) {
  const double along = hh + ho, square = along + ho + oo, norms = std::sqrt(hh) * std::sqrt(std::max(square, 0.0));
  if (norms == 0) return 1;
  if (along < 0) return 1 - along / norms;
  return std::max(hh * oo - ho * ho, 0.0) / (norms * (norms + along));
}

// How far a token's output, as it was rounded, turns its residual.
template <class T>
MOEKERN_INLINE double turn_of(const CombineAndMeasure& args, int64_t t) {
  const T *h = static_cast<const T*>(args.residual) + t * args.H, *out = static_cast<const T*>(args.out) + t * args.H;
  Dots first, second;
  int64_t i = 0;
  for (; i + kLanes <= args.H; i += kLanes) {
    add_dots(h + i, out + i, first);
    add_dots(h + i + kLanes / 2, out + i + kLanes / 2, second);
  }
  if (i < args.H) {
    T tails[2][kLanes] = {};
    std::memcpy(tails[0], h + i, (args.H - i) * sizeof(T));
    std::memcpy(tails[1], out + i, (args.H - i) * sizeof(T));
    add_dots(tails[0], tails[1], first);
    add_dots(tails[0] + kLanes / 2, tails[1] + kLanes / 2, second);
  }
  return turned(sum_of_dots(first.hh_a, first.hh_b, second.hh_a, second.hh_b, h),
                sum_of_dots(first.ho_a, first.ho_b, second.ho_a, second.ho_b, h),
                sum_of_dots(first.oo_a, first.oo_b, second.oo_a, second.oo_b, h));
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
    if (args.residual) args.residual_sum[e] += gated * routing.turn[t];
  }
  for (int64_t j = e + 1; j < E; ++j) {
    args.pair_sum[e * E + j] += pairs[j];
    args.pair_sum[j * E + e] += pairs[j];
  }
}

// One expert's rows of a chunk, and one over their norms: rows of norm 0 have no direction.
template <class T>
struct Chunk {
  const T* rows[kRows];
  float inverses[kRows];
  int64_t n = 0;
};

template <class T>
void find_chunk(const CombineAndMeasure& args, const T* y, const Routing& routing, int64_t first, int64_t stop,
                Chunk<T>& chunk) {
  chunk.n = 0;
  for (int64_t row = first; row < stop; ++row) {
    if (args.mask && !args.mask[args.order[row] / args.K]) continue;
    const double square = routing.square[row];
    chunk.rows[chunk.n] = y + row * args.H;
    chunk.inverses[chunk.n++] = square == 0 ? 0.0f : static_cast<float>(1 / std::sqrt(square));
  }
}

// Sums of a block of columns; they lie as unpacked.
struct Dimensions {
  float square[kDimensions], value[kDimensions], unit[kDimensions];
};

// kTogether rows join the sums of 16 columns, one after the other.
template <int kTogether, class T>
MOEKERN_INLINE void add_rows(const T* const* rows, const float* inverses, int64_t at, int64_t i, Dimensions& sums) {
  Floats square_a = read<Floats>(sums.square + i), square_b = read<Floats>(sums.square + i + kVector);
  Floats value_a = read<Floats>(sums.value + i), value_b = read<Floats>(sums.value + i + kVector);
  Floats unit_a = read<Floats>(sums.unit + i), unit_b = read<Floats>(sums.unit + i + kVector);
  for (int r = 0; r < kTogether; ++r) {
    Floats a, b;
    unpack(rows[r] + at, a, b);
    square_a += a * a;
    square_b += b * b;
    value_a += a;
    value_b += b;
    unit_a += a * inverses[r];
    unit_b += b * inverses[r];
  }
  pack(square_a, square_b, sums.square + i);
  pack(value_a, value_b, sums.value + i);
  pack(unit_a, unit_b, sums.unit + i);
}

// Columns [start, start + n) of kTogether rows; the rows that come next are fetched.
template <int kTogether, class T>
MOEKERN_INLINE void add_columns_of_rows(const T* const* rows, const float* inverses, int64_t ahead, int64_t start,
                                        int64_t n, Dimensions& sums) {
  int64_t i = 0;
  for (; i + 2 * kVector <= n; i += 2 * kVector) {
    for (int r = 0; r < kTogether; ++r) prefetch(rows[r] + ahead + start + i);
    add_rows<kTogether>(rows, inverses, start + i, i, sums);
  }
  if (i == n) return;
  T tails[kTogether][2 * kVector] = {};
  const T* at[kTogether];
  for (int r = 0; r < kTogether; ++r) {
    std::memcpy(tails[r], rows[r] + start + i, (n - i) * sizeof(T));
    at[r] = tails[r];
  }
  add_rows<kTogether>(at, inverses, 0, i, sums);
}

template <class T>
MOEKERN_INLINE void add_to_total(const float* sum, int64_t n, double* total, const T* y) {
  for (int64_t i = 0; i < n; i += 2 * kVector) {
    float column[2 * kVector];
    in_order(read<Floats>(sum + i), read<Floats>(sum + i + kVector), column, y);
    for (int64_t j = 0; j < std::min<int64_t>(2 * kVector, n - i); ++j) total[i + j] += column[j];
  }
}

// A block of columns of one expert's sums: its rows lie side by side, so this second read of y is sequential.
template <class T>
MOEKERN_INLINE void add_dimensions(const CombineAndMeasure& args, const Chunk<T>& chunk, const T* y, int64_t e,
                                   int64_t start) {
  const int64_t H = args.H, n = std::min(kDimensions, H - start);
  Dimensions sums = {};
  int64_t r = 0;
  for (; r + kTogether <= chunk.n; r += kTogether) {
    const int64_t ahead = r + 2 * kTogether <= chunk.n ? chunk.rows[r + kTogether] - chunk.rows[r] : 0;
    add_columns_of_rows<kTogether>(chunk.rows + r, chunk.inverses + r, ahead, start, n, sums);
  }
  for (; r < chunk.n; ++r) add_columns_of_rows<1>(chunk.rows + r, chunk.inverses + r, 0, start, n, sums);
  const int64_t at = e * H + start;
  add_to_total(sums.square, n, args.square_sum + at, y);
  add_to_total(sums.value, n, args.value_sum + at, y);
  add_to_total(sums.unit, n, args.unit_sum + at, y);
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
      at_level(level, [&]() __attribute__((always_inline)) {
        combine_token(args, t, routing, filled[worker]);
        if (args.residual) routing.turn[t] = turn_of<T>(args, t);
      });
    }
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
      find_chunk(args, y, routing, first, std::min(first + kRows, args.offsets[e + 1]), chunks[worker]);
      at_level(level, [&]() __attribute__((always_inline)) { add_dimensions(args, chunks[worker], y, e, start); });
    }
  });
}

}  // namespace

void combine_and_measure(const CombineAndMeasure& args, const Run& run) {
  with_floats(args.y, [&](const auto* y) { run_all(args, y, run); });
}

}  // namespace moekern::cpu
