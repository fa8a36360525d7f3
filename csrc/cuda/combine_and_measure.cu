#include "../turn.h"
#include "combine_and_measure.h"
#include "slots.h"

namespace moekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRuns = 2;  // of columns that a thread has at once
constexpr int kMostSlots = kWarp;

template <class T>
constexpr int kRun = 16 / sizeof(T);  // neighbouring columns: one load

template <class T>
struct Combine {
  const T *y, *residual;  // residual may be null
  T* out;
  Typed weight;
  const int64_t* row_of;  // [T, K], -1: empty
  const bool* mask;
  RowMeasures to;
  int64_t H;
  int K;
};

// A run of columns, zero from H on. `whole` says that runs end where H does and lie on multiples of their size.
template <bool kWhole, class T>
__device__ inline void read_run(const T* row, int64_t column, int64_t H, float* to) {
  if (kWhole && column < H) {
    const Vector<T, kRun<T>> run = read<kRun<T>>(row + column);
    for (int j = 0; j < kRun<T>; ++j) to[j] = load(run.at[j]);
  } else {
    for (int j = 0; j < kRun<T>; ++j) to[j] = column + j < H ? load(row[column + j]) : 0.0f;
  }
}

// Rounds v to T in place, and stores it.
template <bool kWhole, class T>
__device__ inline void write_run(float* v, int64_t column, int64_t H, T* row) {
  Vector<T, kRun<T>> run;
  for (int j = 0; j < kRun<T>; ++j) {
    store(v[j], &run.at[j]);
    v[j] = load(run.at[j]);
  }
  if (kWhole && column < H) {
    *reinterpret_cast<Vector<T, kRun<T>>*>(row + column) = run;
  } else {
    for (int j = 0; j < kRun<T>; ++j)
      if (column + j < H) row[column + j] = run.at[j];
  }
}

// The sum of a run's products, as a tree.
template <int kN>
__device__ inline float dot_of_run(const float* a, const float* b) {
  float product[kN];
  for (int j = 0; j < kN; ++j) product[j] = a[j] * b[j];
  for (int width = kN / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) product[j] += product[j + width];
  return product[0];
}

// Bits of |v|, which are ordered like the numbers, with NaN above all.
__device__ inline unsigned magnitude(float v) { return bit_cast<unsigned>(v) & 0x7FFFFFFFu; }

__device__ inline unsigned max_of_warp(unsigned v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v = max(v, __shfl_xor_sync(kAll, v, step));
  return v;
}

struct Shared {
  float square[kMostSlots][kWarps];
  unsigned top[kMostSlots][kWarps];
  float dot[3][kWarps];
};

// One panel of columns of one row joins the thread's columns of the output and the warp's measures of the row.
template <bool kWhole, class T>
__device__ inline void add_row(const Combine<T>& a, const T* row, float gate, int64_t column, int k, float (*sum)[kRun<T>],
                               Shared& shared) {
  float v[kRuns][kRun<T>], square = 0;
  unsigned top = 0;
  for (int i = 0; i < kRuns; ++i) read_run<kWhole>(row, column + i * kThreads * kRun<T>, a.H, v[i]);
  for (int i = 0; i < kRuns; ++i) {
    for (int j = 0; j < kRun<T>; ++j) {
      sum[i][j] += gate * v[i][j];
      top = max(top, magnitude(v[i][j]));
    }
    square += dot_of_run<kRun<T>>(v[i], v[i]);
  }
  square = sum_of_warp(square);
  top = max_of_warp(top);
  if (threadIdx.x % kWarp) return;
  const int warp = threadIdx.x / kWarp;
  shared.square[k][warp] += square;
  shared.top[k][warp] = max(shared.top[k][warp], top);
}

template <bool kWhole, class T>
__device__ inline void add_dots(const Combine<T>& a, int64_t t, int64_t column, float (*out)[kRun<T>], float* dot) {
  for (int i = 0; i < kRuns; ++i) {
    float h[kRun<T>];
    read_run<kWhole>(a.residual + t * a.H, column + i * kThreads * kRun<T>, a.H, h);
    dot[0] += dot_of_run<kRun<T>>(h, h);
    dot[1] += dot_of_run<kRun<T>>(h, out[i]);
    dot[2] += dot_of_run<kRun<T>>(out[i], out[i]);
  }
}

// What the warps know of each row of the token becomes its measures.
template <class T>
__device__ inline void write_measures(const Combine<T>& a, int64_t t, const Shared& shared) {
  for (int k = threadIdx.x; k < a.K; k += kThreads) {
    const int64_t slot = t * a.K + k, row = a.row_of[slot];
    a.to.gated[slot] = 0;
    if (row < 0) continue;
    float square = 0;
    unsigned top = 0;
    for (int w = 0; w < kWarps; ++w) {
      square += shared.square[k][w];
      top = max(top, shared.top[k][w]);
    }
    const double norm = sqrt(static_cast<double>(square));
    a.to.square[row] = square;
    a.to.top[row] = bit_cast<float>(top);
    a.to.inverse[row] = a.mask && !a.mask[t] ? -1.0f : square == 0 ? 0.0f : static_cast<float>(1 / norm);
    a.to.gated[slot] = static_cast<double>(float_at(a.weight, slot)) * norm;
  }
  if (threadIdx.x > 0 || !a.residual) return;
  double dot[3] = {};
  for (int i = 0; i < 3; ++i) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared.dot[i][w];
    dot[i] = sum;
  }
  a.to.turn[t] = turned(dot[0], dot[1], dot[2]);
}

// A block for each token. A thread keeps its columns of the output in registers while the token's rows pass.
template <bool kWhole, class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(Combine<T> a) {
  __shared__ Shared shared;
  const int64_t t = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < a.K * kWarps; i += kThreads) {
    shared.square[i / kWarps][i % kWarps] = 0;
    shared.top[i / kWarps][i % kWarps] = 0;
  }
  __syncthreads();
  float dot[3] = {};
  for (int64_t start = 0; start < a.H; start += kRuns * kThreads * kRun<T>) {
    const int64_t column = start + threadIdx.x * kRun<T>;
    float sum[kRuns][kRun<T>] = {};
#pragma unroll 2
    for (int k = 0; k < a.K; ++k) {
      const int64_t row = a.row_of[t * a.K + k];
      if (row >= 0) add_row<kWhole>(a, a.y + row * a.H, float_at(a.weight, t * a.K + k), column, k, sum, shared);
    }
    for (int i = 0; i < kRuns; ++i) write_run<kWhole>(sum[i], column + i * kThreads * kRun<T>, a.H, a.out + t * a.H);
    if (a.residual) add_dots<kWhole>(a, t, column, sum, dot);
  }
  for (int i = 0; i < 3 && a.residual; ++i) {
    const float sum = sum_of_warp(dot[i]);
    if (lane == 0) shared.dot[i][warp] = sum;
  }
  __syncthreads();
  write_measures(a, t, shared);
}

template <class T>
void run_all(const CombineAndMeasure& args, const T* y, cudaStream_t stream) {
  const int64_t slots = args.T * args.K;
  const Scratch<int64_t> row_of(slots, stream);
  const Scratch<float> square(args.N, stream), inverse(args.N, stream), top(args.N, stream);
  const Scratch<double> gated(slots, stream), turn(args.residual ? args.T : 0, stream);
  const RowMeasures rows{square, inverse, top, gated, turn};
  row_of.fill(0xFF);
  inverse.fill(0xBF);  // negative: a row that no slot has does not count
  launch(row_of_kernel<kThreads>, blocks(parts(args.N, kThreads)), kThreads, 0, stream, args.order, args.offsets,
         nullptr, args.E, args.N, slots, args.K, row_of);
  const Combine<T> a{y, static_cast<const T*>(args.residual), static_cast<T*>(args.out), args.weight, row_of, args.mask,
                     rows, args.H, static_cast<int>(args.K)};
  const bool whole = args.H % kRun<T> == 0 && aligned(y, 16) && aligned(args.out, 16) && aligned(args.residual, 16);
  launch(whole ? combine_kernel<true, T> : combine_kernel<false, T>, blocks(args.T), kThreads, 0, stream, a);
  add_expert_sums(args, rows, stream);
  if (args.square_sum) add_dimensions(args, rows, stream);
}

}  // namespace

void combine_and_measure(const CombineAndMeasure& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (args.K > kWarp) throw ArgumentError("topk_idx", "expected at most " + std::to_string(kWarp) + " slots on a GPU");
  if (args.T == 0) return;
  with_floats(args.y, [&](const auto* y) { run_all(args, y, stream); });
}

}  // namespace moekern::cuda
