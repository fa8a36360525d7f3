// Tensors borrowed from Python through DLPack, and the checks that make an op's raw pointers safe to follow.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "dlpack.h"
#include "kernels.h"

namespace moekern {

inline Dtype dtype_of(const DLDataType& type) {
  if (type.lanes != 1) return Dtype::other;
  if (type.code == kDLFloat && type.bits == 64) return Dtype::f64;
  if (type.code == kDLFloat && type.bits == 32) return Dtype::f32;
  if (type.code == kDLFloat && type.bits == 16) return Dtype::f16;
  if (type.code == kDLBfloat && type.bits == 16) return Dtype::bf16;
  if (type.code == kDLInt && type.bits == 64) return Dtype::i64;
  if (type.code == kDLInt && type.bits == 32) return Dtype::i32;
  if (type.code == kDLUInt && type.bits == 8) return Dtype::u8;
  if (type.code == kDLBool && type.bits == 8) return Dtype::boolean;
  return Dtype::other;
}

inline const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16", "int32",
                                    "int64",   "uint8",   "bool",     "another"};
  return kNames[static_cast<int>(dtype)];
}

struct Tensor {
  std::shared_ptr<DLManagedTensor> owner;
  Dtype dtype = Dtype::other;

  template <class T>
  T* data() const {
    const DLTensor& t = owner->dl_tensor;
    void* first = static_cast<char*>(t.data) + t.byte_offset;
    return static_cast<T*>(first);
  }
  Typed typed() const { return {data<const void>(), dtype}; }
  bool is_cuda() const { return owner->dl_tensor.device.device_type == kDLCUDA; }
};

// The arguments of one call: the first tensor that uses a size's name binds it, the others must agree.
class Args {
 public:
  explicit Args(const char* op) : op_(op) {}

  Tensor tensor(const char* name, const pybind11::object& object, std::initializer_list<Dtype> dtypes,
                const std::string& dims) {
    Tensor tensor = borrow(name, object);
    const DLTensor& t = tensor.owner->dl_tensor;
    std::string expected;
    bool known = false;
    for (const Dtype dtype : dtypes) {
      known = known || dtype == tensor.dtype;
      expected += (expected.empty() ? "" : " or ") + std::string(name_of(dtype));
    }
    if (!known) fail(name, "expected " + expected + ", got " + name_of(tensor.dtype));
    check_device(name, t.device);
    check_shape(name, t, dims);
    check_contiguous(name, t);
    return tensor;
  }

  // A sum that the op adds to, by the name of its field: no place in a tuple can be mistaken for another. Its memory is
  // held as long as the arguments are.
  template <class T>
  T* sum(const pybind11::object& sums, const char* name, const std::string& dims) {
    held_.push_back(tensor(name, field(sums, name), {std::is_same_v<T, double> ? Dtype::f64 : Dtype::i64}, dims));
    return held_.back().template data<T>();
  }

  // Whether a matrix of sums that may be left out was asked for: one that was not has no columns.
  bool measured(const pybind11::object& sums, const char* name) const {
    const Tensor tensor = borrow(name, field(sums, name));
    const DLTensor& t = tensor.owner->dl_tensor;
    return t.ndim < 2 || t.shape[1] > 0;
  }

  bool on_cuda() const { return device_.device_type == kDLCUDA; }

  int64_t operator[](const std::string& size) const { return sizes_.at(size); }

  [[noreturn]] void fail(const std::string& name, const std::string& what) const {
    throw pybind11::value_error("[" + op_ + "] " + name + ": " + what);
  }

 private:
  pybind11::object field(const pybind11::object& sums, const char* name) const {
    if (!pybind11::hasattr(sums, name)) fail(name, "expected a field of the sums");
    return sums.attr(name);
  }

  Tensor borrow(const char* name, const pybind11::object& object) const {
    if (!pybind11::hasattr(object, "__dlpack__")) fail(name, "expected a tensor");
    // -1: the stream is ours to order. Otherwise torch would make its default stream wait, which no CUDA graph may record.
    const auto device = pybind11::tuple(object.attr("__dlpack_device__")());
    const bool cuda = pybind11::int_(device[0]).cast<int>() == kDLCUDA;
    const pybind11::object capsule =
        cuda ? object.attr("__dlpack__")(pybind11::arg("stream") = -1) : object.attr("__dlpack__")();
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (!managed) throw pybind11::error_already_set();
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    const auto release = [](DLManagedTensor* m) {
      if (m->deleter) m->deleter(m);
    };
    return {std::shared_ptr<DLManagedTensor>(managed, release), dtype_of(managed->dl_tensor.dtype)};
  }

  void check_device(const char* name, const DLDevice& device) {
    if (device.device_type != kDLCPU && device.device_type != kDLCUDA) fail(name, "expected a CPU or CUDA tensor");
    if (!bound_) device_ = device;
    bound_ = true;
    if (device.device_type != device_.device_type || device.device_id != device_.device_id)
      fail(name, "expected all tensors on one device");
  }

  // "T K" names sizes, "E+1" is one more than E, a number is itself.
  void check_shape(const char* name, const DLTensor& t, const std::string& dims) {
    std::istringstream text(dims);
    const std::vector<std::string> words{std::istream_iterator<std::string>(text), {}};
    if (static_cast<size_t>(t.ndim) != words.size()) {
      std::vector<std::string> got;
      for (int32_t i = 0; i < t.ndim; ++i) got.push_back(std::to_string(t.shape[i]));
      fail(name, "expected shape " + listed(words) + ", got " + listed(got));
    }
    for (int32_t i = 0; i < t.ndim; ++i) {
      const size_t plus = words[i].find('+');
      const int64_t extra = plus == std::string::npos ? 0 : std::stoll(words[i].substr(plus + 1));
      const std::string size = words[i].substr(0, plus);
      const bool is_number = size.find_first_not_of("0123456789") == std::string::npos;
      const int64_t want = is_number ? std::stoll(size) : bound(size, t.shape[i] - extra);
      if (t.shape[i] != want + extra)
        fail(name, "expected " + (is_number ? size : words[i] + "=" + std::to_string(want + extra)) + ", got " +
                       std::to_string(t.shape[i]));
    }
  }

  int64_t bound(const std::string& size, int64_t to) { return sizes_.emplace(size, to < 0 ? 0 : to).first->second; }

  static std::string listed(const std::vector<std::string>& words) {
    std::string text;
    for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
    return "[" + text + "]";
  }

  void check_contiguous(const char* name, const DLTensor& t) const {
    int64_t count = 1;
    for (int32_t i = 0; i < t.ndim; ++i) count *= t.shape[i];
    if (!t.strides || count == 0) return;
    int64_t stride = 1;
    for (int32_t i = t.ndim - 1; i >= 0; --i) {
      if (t.shape[i] != 1 && t.strides[i] != stride) fail(name, "expected a contiguous tensor");
      stride *= t.shape[i];
    }
  }

  std::string op_;
  std::map<std::string, int64_t> sizes_;
  std::vector<Tensor> held_;
  DLDevice device_{};
  bool bound_ = false;
};

}  // namespace moekern
