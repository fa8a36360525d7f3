// Experts' activations times the gates, and their squares' sums by channel: float32 in the rows' order inside a chunk,
// float64 across chunks. A task has some channels of one expert, and its rows in order.
#include "../activations.h"
#include "grouped.h"
#include "parallel.h"
#include "slots.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kChannels = 512;  // of a task
constexpr int64_t kChunk = 256;     // rows whose squares are summed in float32

// n channels of one row: gate x act(x) u, or without u where that is null; their squares join the sums.
template <class Act, class T>
MOEKERN_INLINE void add_row(const T* x, const T* u, float gate, int64_t n, bool counted, float* to, float* sum) {
  float v[kChannels];
  for (int64_t i = 0; i < n; ++i) v[i] = Act::of(load(x[i]));
  if (u)
    for (int64_t i = 0; i < n; ++i) v[i] *= load(u[i]);
  for (int64_t i = 0; i < n; ++i) v[i] *= gate;
  std::memcpy(to, v, n * sizeof(float));
  if (counted)
    for (int64_t i = 0; i < n; ++i) sum[i] += v[i] * v[i];
}

template <class Act, class T>
MOEKERN_INLINE void add_rows(const GatedEnergy& args, const T* rows, const float* gates, int64_t e, int64_t channel) {
  const int64_t n = std::min(kChannels, args.M - channel);
  const bool halves = args.W != args.M;
  double* energy = args.energy + e * args.M + channel;
  float sum[kChannels] = {};
  int64_t added = 0;
  for (int64_t row = args.offsets[e]; row < args.offsets[e + 1]; ++row) {
    const T* x = rows + row * args.W + channel;
    const bool counted = !args.mask || args.mask[row];
    add_row<Act>(x, halves ? x + args.M : nullptr, gates[row], n, counted, args.out + row * args.M + channel, sum);
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
    with_activation(args.activation, [&](auto act) {
      parallel_for(args.E * blocks, run.threads, [&](int64_t task, int) {
        at_level(level, [&]() __attribute__((always_inline)) {
          add_rows<decltype(act)>(args, rows, gates.data(), task / blocks, task % blocks * kChannels);
        });
      });
    });
  });
}

}  // namespace moekern::cpu
