// Sums over weights: a thread adds 64 in float32, in order; threads, and blocks of 16384 weights, add up in float64.
#include "block.h"
#include "quantised.h"

namespace moekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kEights = 8;  // a thread reads
constexpr uint32_t kTask = kThreads * kEights;

// What one block adds. Bits of magnitudes are ordered like integers, with NaN above all.
struct Partial {
  double abs_sum, square_sum;
  uint32_t top;
};

struct Join {
  __device__ Partial operator()(const Partial& a, const Partial& b) const {
    return {a.abs_sum + b.abs_sum, a.square_sum + b.square_sum, a.top > b.top ? a.top : b.top};
  }
};

// What reads the i-th eight weights of an expert.
template <class T>
struct Dense {
  const T* from;
  int64_t N;
  __device__ void read(uint32_t e, uint32_t i, float* v) const {
    const Eight<T> eight = read_eight(from + e * N, int64_t{8} * i, N);
    for (int j = 0; j < 8; ++j) v[j] = load(eight.at[j]);
  }
};

template <class Coding>
struct Codes {
  Quantised q;
  __device__ void read(uint32_t e, uint32_t i, float* v) const {
    EightWeights weights;
    read_weights<Coding>(q, e, i, weights);
    for (int j = 0; j < 8; ++j) v[j] = weights.v[j];
  }
};

template <class Reader>
__global__ void sum_task(Reader reader, uint32_t eights, uint32_t tasks, Partial* partials) {
  const uint32_t e = blockIdx.x / tasks, first = blockIdx.x % tasks * kTask + threadIdx.x;
  float abs_sum = 0, square_sum = 0;
  Partial mine = {};
  for (int n = 0; n < kEights; ++n) {
    const uint32_t i = first + n * kThreads;
    if (i >= eights) break;
    float v[8];
    reader.read(e, i, v);
    for (int j = 0; j < 8; ++j) {
      const uint32_t magnitude = bit_cast<uint32_t>(v[j]) & 0x7FFFFFFFu;
      abs_sum += bit_cast<float>(magnitude);
      square_sum += v[j] * v[j];
      mine.top = magnitude > mine.top ? magnitude : mine.top;
    }
  }
  mine.abs_sum = abs_sum;
  mine.square_sum = square_sum;
  const Partial all = block_reduce<kThreads>(mine, Join{});
  if (threadIdx.x == 0) partials[blockIdx.x] = all;
}

// One block an expert: thread n adds tasks n, n + 256 and so on.
__global__ void add_partials(WeightStats args, int64_t weights, uint32_t tasks, const Partial* partials) {
  const int64_t e = blockIdx.x;
  Partial mine = {};
  for (uint32_t task = threadIdx.x; task < tasks; task += kThreads) mine = Join{}(mine, partials[e * tasks + task]);
  const Partial all = block_reduce<kThreads>(mine, Join{});
  if (threadIdx.x != 0) return;
  args.count[e] += weights;
  args.abs_sum[e] += all.abs_sum;
  args.square_sum[e] += all.square_sum;
  const double top = bit_cast<float>(all.top), before = args.max_abs[e];
  args.max_abs[e] = top <= before || before != before ? before : top;  // a NaN stays
}

template <class Reader>
void run(const WeightStats& args, const Reader& reader, int64_t weights, uint32_t eights, cudaStream_t stream) {
  const uint32_t tasks = parts(eights, kTask);
  const Scratch<Partial> partials(args.E * tasks, stream);
  launch(sum_task<Reader>, blocks(args.E * tasks), kThreads, 0, stream, reader, eights, tasks, partials);
  launch(add_partials, blocks(args.E), kThreads, 0, stream, args, weights, tasks, partials);
}

}  // namespace

void weight_stats(const WeightStats& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (args.quantised) {
    const Quantised& q = *args.quantised;
    const uint32_t eights = eights_of(q);
    return with_coding(q.coding, [&](auto coding) {
      run(args, Codes<decltype(coding)>{q}, q.R * q.C, eights, stream);
    });
  }
  if (args.N >= int64_t{1} << 34) throw ArgumentError("weight", "expected fewer than 2^34 weights an expert");
  with_floats(args.dense, [&](const auto* w) {
    run(args, Dense<std::decay_t<decltype(*w)>>{w, args.N}, args.N, parts(args.N, 8), stream);
  });
}

}  // namespace moekern::cuda
