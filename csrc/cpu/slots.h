// Reading ids, gates and floating-point rows of any accepted dtype.
#pragma once

#include "simd.h"

namespace moekern::cpu {

// Ids outside [0, E) become -1: an empty slot.
template <class Int>
inline void read_ids_as(const Int* idx, int64_t n, int64_t E, int32_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t id = idx[i];
    to[i] = id >= 0 && id < E ? static_cast<int32_t>(id) : -1;
  }
}

inline void read_ids(const Typed& idx, int64_t start, int64_t n, int64_t E, int32_t* to) {
  if (idx.dtype == Dtype::i64) return read_ids_as(static_cast<const int64_t*>(idx.data) + start, n, E, to);
  read_ids_as(static_cast<const int32_t*>(idx.data) + start, n, E, to);
}

// Calls f with a typed pointer to the first element.
template <class F>
void with_floats(const Typed& values, const F& f) {
  if (values.dtype == Dtype::bf16) return f(static_cast<const bfloat16*>(values.data));
  if (values.dtype == Dtype::f16) return f(static_cast<const float16*>(values.data));
  f(static_cast<const float*>(values.data));
}

inline void read_floats(const Typed& values, int64_t start, int64_t n, float* to) {
  with_floats(values, [&](const auto* from) {
    for (int64_t i = 0; i < n; ++i) to[i] = load(from[start + i]);
  });
}

}  // namespace moekern::cpu
