#include "../kernels.h"
#include "parallel.h"
#include "quantised.h"
#include "slots.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kChunk = 2048;     // columns: summed in float32 within, in float64 across, always in this order
constexpr int64_t kTask = 64 << 10;  // about as many elements a task sums

// What one task adds. Bits of magnitudes are ordered like integers, with NaN above all.
struct Partial {
  double abs_sum = 0, square_sum = 0;
  int32_t top = 0;
};

struct Lanes {
  F8 abs_sum[kEights] = {}, square_sum[kEights] = {};
  I8 top[2] = {};  // more would not fit into sixteen registers
};

MOEKERN_INLINE void add_eight(const F8& v, int k, Lanes& to) {
  const I8 magnitude = (I8)v & 0x7FFFFFFF;
  to.abs_sum[k] += (F8)magnitude;
  to.square_sum[k] += v * v;
  to.top[k % 2] = magnitude > to.top[k % 2] ? magnitude : to.top[k % 2];
}

MOEKERN_INLINE void add_chunk(const Lanes& lanes, Partial& to) {
  float sum[kLanes];
  std::memcpy(sum, lanes.abs_sum, sizeof sum);
  to.abs_sum += sum_of(sum);
  std::memcpy(sum, lanes.square_sum, sizeof sum);
  to.square_sum += sum_of(sum);
  for (const I8& top : lanes.top)
    for (int j = 0; j < 8; ++j) to.top = std::max(to.top, top[j]);
}

template <class T>
MOEKERN_INLINE void add_32(const T* w, Lanes& to) {
  F8 v[kEights];
  unpack(w, v[0], v[1]);
  unpack(w + 16, v[2], v[3]);
  for (int k = 0; k < kEights; ++k) add_eight(v[k], k, to);
}

template <class T>
MOEKERN_INLINE void add_dense(const T* w, int64_t n, Partial& to) {
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t stop = std::min(n, start + kChunk);
    Lanes lanes;
    int64_t i = start;
    for (; i + kLanes <= stop; i += kLanes) add_32(w + i, lanes);
    if (i < stop) {
      T tail[kLanes] = {};
      std::memcpy(tail, w + i, (stop - i) * sizeof(T));
      add_32(tail, lanes);
    }
    add_chunk(lanes, to);
  }
}

// Adds up a row's columns and closes a chunk every kChunk of them.
struct AddRow {
  Lanes& lanes;
  Partial& to;
  int64_t C;
  MOEKERN_INLINE void operator()(int64_t c, int64_t n, const F8* v) const {
    for (int k = 0; k < kEights; ++k) add_eight(v[k], k, lanes);
    if ((c + kLanes) % kChunk != 0 && c + n != C) return;
    add_chunk(lanes, to);
    lanes = Lanes{};
  }
};

// Each expert's tasks in order, so that threads change nothing.
void add_partials(const WeightStats& args, const std::vector<Partial>& partials, int64_t elements) {
  const int64_t tasks = args.E ? static_cast<int64_t>(partials.size()) / args.E : 0;
  for (int64_t e = 0; e < args.E; ++e) {
    Partial sum;
    for (int64_t task = 0; task < tasks; ++task) {
      const Partial& p = partials[e * tasks + task];
      sum.abs_sum += p.abs_sum;
      sum.square_sum += p.square_sum;
      sum.top = std::max(sum.top, p.top);
    }
    args.count[e] += elements;
    args.abs_sum[e] += sum.abs_sum;
    args.square_sum[e] += sum.square_sum;
    const double top = bit_cast<float>(sum.top), before = args.max_abs[e];
    args.max_abs[e] = top <= before || before != before ? before : top;  // a NaN stays
  }
}

template <class T>
void run_dense(const WeightStats& args, const T* w, const Run& run) {
  const Level level = level_of(run.level);
  const int64_t tasks = (args.N + kTask - 1) / kTask;
  std::vector<Partial> partials(args.E * tasks);
  parallel_for(args.E * tasks, run.threads, [&](int64_t i, int) {
    const int64_t start = i % tasks * kTask, n = std::min(kTask, args.N - start);
    const T* from = w + i / tasks * args.N + start;
    at_level(level, [&]() __attribute__((always_inline)) { add_dense(from, n, partials[i]); });
  });
  add_partials(args, partials, args.N);
}

template <class Coding>
void run_quantised(const WeightStats& args, const Run& run) {
  const Quantised& q = *args.quantised;
  const Level level = level_of(run.level);
  const int64_t rows = (kTask + q.C - 1) / std::max<int64_t>(q.C, 1), tasks = q.C ? (q.R + rows - 1) / rows : 0;
  std::vector<Partial> partials(q.E * tasks);
  std::vector<Scales> scales(workers_for(q.E * tasks, run.threads), Scales(q));
  parallel_for(q.E * tasks, run.threads, [&](int64_t i, int worker) {
    const int64_t e = i / tasks, first = i % tasks * rows, stop = std::min(q.R, first + rows);
    at_level(level, [&]() __attribute__((always_inline)) {
      Lanes lanes;
      for (int64_t r = first; r < stop; ++r)
        read_row<Coding>(q, e, r, scales[worker], AddRow{lanes, partials[i], q.C});
    });
  });
  add_partials(args, partials, q.R * q.C);
}

}  // namespace

void weight_stats(const WeightStats& args, const Run& run) {
  if (!args.quantised) return with_floats(args.dense, [&](const auto* w) { run_dense(args, w, run); });
  check_groups(*args.quantised);
  with_coding(args.quantised->coding, [&](auto coding) { run_quantised<decltype(coding)>(args, run); });
}

}  // namespace moekern::cpu
