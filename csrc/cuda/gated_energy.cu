// Experts' activations times the gates, and their squares' sums by channel: a thread has a channel and a share of one
// expert's chunks of rows.
#include "grouped.h"
#include "rows.h"

namespace moekern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kChunk = 256;  // rows whose squares are added in float32
constexpr int64_t kSlices = 8;   // of an expert's chunks

// Block (channels, expert, slice): sums [kSlices, E, M].
template <class T>
__global__ void __launch_bounds__(kThreads) add_slices(GatedEnergy args, const T* rows, double* sums) {
  const int64_t slice = blockIdx.y % kSlices, e = blockIdx.y / kSlices;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= args.M) return;
  const Range range = rows_of(args.offsets, e, args.N);
  double total = 0;
  for (int64_t chunk = range.first + slice * kChunk; chunk < range.stop; chunk += kSlices * kChunk) {
    float sum = 0;
    for (int64_t n = chunk; n < min(chunk + kChunk, range.stop); ++n) {
      const float v = load(rows[n * args.M + i]) * float_at(args.gates, n);
      args.out[n * args.M + i] = v;
      if (!args.mask || args.mask[n]) sum += v * v;
    }
    total += sum;
  }
  sums[(slice * args.E + e) * args.M + i] = total;
}

// Rows that no expert has.
__global__ void clear_rows(GatedEnergy args) {
  const int64_t behind = args.E ? max(int64_t{0}, min(args.offsets[args.E], args.N)) : 0;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = behind * args.M + int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.N * args.M; i += step)
    args.out[i] = 0;
}

}  // namespace

void gated_energy(const GatedEnergy& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Scratch<double> sums(kSlices * args.E * args.M, stream);
  launch(clear_rows, blocks(std::min<int64_t>(parts(args.N * args.M, kThreads), 1024)), kThreads, 0, stream, args);
  with_floats(args.rows, [&](const auto* rows) {
    using T = std::decay_t<decltype(*rows)>;
    launch(add_slices<T>, blocks(parts(args.M, kThreads), kSlices * args.E), kThreads, 0, stream, args, rows, sums);
  });
  add_rows<double>(sums, kSlices, args.E * args.M, args.energy, stream);
}

}  // namespace moekern::cuda
