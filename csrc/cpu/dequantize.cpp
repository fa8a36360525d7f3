#include "../kernels.h"
#include "parallel.h"
#include "quantised.h"
#include "slots.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kRows = 16;  // rows a task writes

template <class T>
struct StoreRow {
  T* out;
  MOEKERN_INLINE void operator()(int64_t c, int64_t n, const F8* eights) const {
    float v[kLanes];
    std::memcpy(v, eights, sizeof v);
    if (n == kLanes)
      for (int j = 0; j < kLanes; ++j) store(v[j], out + c + j);
    else
      for (int64_t j = 0; j < n; ++j) store(v[j], out + c + j);
  }
};

template <class Coding, class T>
void run_all(const Quantised& q, T* out, const Run& run) {
  const Level level = level_of(run.level);
  const int64_t tasks = (q.R + kRows - 1) / kRows;
  std::vector<Scales> scales(workers_for(q.E * tasks, run.threads), Scales(q));
  parallel_for(q.E * tasks, run.threads, [&](int64_t i, int worker) {
    const int64_t e = i / tasks, first = i % tasks * kRows, stop = std::min(q.R, first + kRows);
    at_level(level, [&]() __attribute__((always_inline)) {
      for (int64_t r = first; r < stop; ++r)
        read_row<Coding>(q, e, r, scales[worker], StoreRow<T>{out + (e * q.R + r) * q.C});
    });
  });
}

}  // namespace

void dequantize(const Dequantize& args, const Run& run) {
  check_groups(args.weight);
  with_coding(args.weight.coding, [&](auto coding) {
    using Coding = decltype(coding);
    switch (args.dtype) {
      case Dtype::bf16: return run_all<Coding>(args.weight, static_cast<bfloat16*>(args.out), run);
      case Dtype::f16: return run_all<Coding>(args.weight, static_cast<float16*>(args.out), run);
      default: return run_all<Coding>(args.weight, static_cast<float*>(args.out), run);
    }
  });
}

}  // namespace moekern::cpu
