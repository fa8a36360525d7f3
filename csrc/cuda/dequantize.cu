#include "quantised.h"

namespace moekern::cuda {
namespace {

constexpr int kThreads = 256;

template <class Coding, class T>
__global__ void write_eights(Quantised q, T* out, uint32_t eights, uint32_t a_expert) {
  const uint32_t e = blockIdx.x / a_expert, i = blockIdx.x % a_expert * kThreads + threadIdx.x;
  if (i >= eights) return;
  EightWeights w;
  read_weights<Coding>(q, e, i, w);
  T* to = out + (e * q.R + w.row) * q.C + w.column;
  const int64_t step = kDown<Coding> ? q.C : 1;
  if (step == 1 && w.n == 8 && lies_on(to, 16)) {
    Eight<T> all;
    for (int j = 0; j < 8; ++j) store(w.v[j], all.at + j);
    *reinterpret_cast<Eight<T>*>(to) = all;
    return;
  }
  for (int j = 0; j < 8; ++j)
    if (j < w.n) store(w.v[j], to + j * step);
}

}  // namespace

void dequantize(const Dequantize& args, void* stream) {
  const Quantised& q = args.weight;
  const uint32_t eights = eights_of(q), a_expert = parts(eights, kThreads);
  if (q.E == 0 || eights == 0) return;
  with_coding(q.coding, [&](auto coding) {
    using Coding = decltype(coding);
    const auto run = [&](auto* out) {
      using T = std::remove_pointer_t<decltype(out)>;
      launch(write_eights<Coding, T>, blocks(q.E * a_expert), kThreads, 0, static_cast<cudaStream_t>(stream), q, out,
             eights, a_expert);
    };
    switch (args.dtype) {
      case Dtype::bf16: return run(static_cast<bfloat16*>(args.out));
      case Dtype::f16: return run(static_cast<float16*>(args.out));
      default: return run(static_cast<float*>(args.out));
    }
  });
}

}  // namespace moekern::cuda
