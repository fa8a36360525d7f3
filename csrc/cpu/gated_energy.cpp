// Experts' activations times the gates, and their squares' sums by channel: float32 in the rows' order inside a chunk,
// float64 across chunks. A task has some channels of one expert, and its rows in order.
#include "grouped.h"
#include "parallel.h"
#include "slots.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kChannels = 512;  // of a task
constexpr int64_t kChunk = 256;     // rows whose squares are summed in float32

// n channels of one row; their squares join the sums.
template <class T>
MOEKERN_INLINE void add_row(const T* x, float gate, int64_t n, bool counted, float* to, float* sum) {
  float v[kChannels];
  for (int64_t i = 0; i < n; ++i) v[i] = load(x[i]) * gate;
  std::memcpy(to, v, n * sizeof(float));
  if (counted)
    for (int64_t i = 0; i < n; ++i) sum[i] += v[i] * v[i];
}

template <class T>
MOEKERN_INLINE void add_rows(const GatedEnergy& args, const T* rows, const float* gates, int64_t e, int64_t channel) {
  const int64_t n = std::min(kChannels, args.M - channel);
  double* energy = args.energy + e * args.M + channel;
  float sum[kChannels] = {};
  int64_t added = 0;
  for (int64_t row = args.offsets[e]; row < args.offsets[e + 1]; ++row) {
    const bool counted = !args.mask || args.mask[row];
    const int64_t at = row * args.M + channel;
    add_row(rows + at, gates[row], n, counted, args.out + at, sum);
    added += counted;
    if (added < kChunk) continue;
    for (int64_t i = 0; i < n; ++i) energy[i] += sum[i];
    std::fill(sum, sum + kChannels, 0.0f);
    added = 0;
  }
  for (int64_t i = 0; i < n; ++i) energy[i] += sum[i];
}

}  // namespace

void gated_energy(const GatedEnergy& args, const Run& run) {
  const Level level = level_of(run.level);
  check_offsets(args.offsets, args.E, args.N);
  const int64_t blocks = (args.M + kChannels - 1) / kChannels, behind = args.offsets[args.E] * args.M;
  std::vector<float> gates(args.N);
  read_floats(args.gates, 0, args.N, gates.data());
  std::fill(args.out + behind, args.out + args.N * args.M, 0.0f);
  with_floats(args.rows, [&](const auto* rows) {
    parallel_for(args.E * blocks, run.threads, [&](int64_t task, int) {
      at_level(level, [&]() __attribute__((always_inline)) {
        add_rows(args, rows, gates.data(), task / blocks, task % blocks * kChannels);
      });
    });
  });
}

}  // namespace moekern::cpu
