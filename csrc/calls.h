// What the bindings of ops share: how a call reaches a kernel.
#pragma once

#include "tensor.h"

namespace moekern {

inline constexpr auto kFloats = {Dtype::f32, Dtype::bf16, Dtype::f16};
inline constexpr auto kInts = {Dtype::i64, Dtype::i32};

// Runs without the GIL; a bad value that the kernel finds becomes the op's ValueError.
template <class F>
void launch(const Args& args, const F& kernel) {
  try {
    pybind11::gil_scoped_release nogil;
    kernel();
  } catch (const ArgumentError& error) {
    args.fail(error.argument, error.what());
  }
}

inline void* stream_of(uintptr_t number) { return reinterpret_cast<void*>(number); }

inline const bool* mask_of(Args& args, const pybind11::object& mask, Tensor& tensor,
                           const char* dims = "T") {
  if (mask.is_none()) return nullptr;
  tensor = args.tensor("mask", mask, {Dtype::boolean}, dims);
  return tensor.data<const bool>();
}

}  // namespace moekern
