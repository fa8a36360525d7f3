// Tensors borrowed from Python through DLPack, and the checks that make an op's raw pointers safe to follow.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
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

// Memory that is there as long as this is. Made, copied and dropped with the GIL held.
struct Tensor {
  DLTensor lent{};
  pybind11::object object;                 // whose memory it is
  std::shared_ptr<DLManagedTensor> owner;  // where it was lent in a capsule
  Dtype dtype = Dtype::other;

  template <class T>
  T* data() const {
    void* first = static_cast<char*>(lent.data) + lent.byte_offset;
    return static_cast<T*>(first);
  }
  Typed typed() const { return {data<const void>(), dtype}; }
  bool is_cuda() const { return lent.device.device_type == kDLCUDA; }
};

// What an object's type has to lend its tensors by; null where it has nothing, or another version.
inline const DLPackExchangeAPI* exchange_of(const pybind11::object& object) {
  static PyObject* const name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  PyObject* found = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())), name);
  const auto capsule = pybind11::reinterpret_steal<pybind11::object>(found);
  const void* table = capsule ? PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api") : nullptr;
  PyErr_Clear();
  const auto* api = static_cast<const DLPackExchangeAPI*>(table);
  return api && api->major == 1 && api->dltensor_from_py_object_no_sync ? api : nullptr;
}

// The arguments of one call: the first tensor that uses a size's name binds it, the others must agree.
class Args {
 public:
  explicit Args(const char* op) : op_(op) {}

  Tensor tensor(const char* name, const pybind11::object& object, std::initializer_list<Dtype> dtypes,
                std::string_view dims) {
    Tensor tensor = borrow(name, object);
    if (std::find(dtypes.begin(), dtypes.end(), tensor.dtype) == dtypes.end()) {
      std::string expected;
      for (const Dtype dtype : dtypes) expected += (expected.empty() ? "" : " or ") + std::string(name_of(dtype));
      fail(name, "expected " + expected + ", got " + name_of(tensor.dtype));
    }
    check_device(name, tensor.lent.device);
    check_shape(name, tensor.lent, dims);
    check_contiguous(name, tensor.lent);
    return tensor;
  }

  // A sum that the op adds to, by the name of its field: no place in a tuple can be mistaken for another. Its memory is
  // held as long as the arguments are.
  template <class T>
  T* sum(const pybind11::object& sums, const char* name, std::string_view dims) {
    held_.push_back(tensor(name, field(sums, name), {std::is_same_v<T, double> ? Dtype::f64 : Dtype::i64}, dims));
    return held_.back().template data<T>();
  }

  // Whether a matrix of sums that may be left out was asked for: one that was not has no columns.
  bool measured(const pybind11::object& sums, const char* name) const {
    const Tensor tensor = borrow(name, field(sums, name));
    return tensor.lent.ndim < 2 || tensor.lent.shape[1] > 0;
  }

  bool on_cuda() const { return device_.device_type == kDLCUDA; }

  int64_t operator[](std::string_view size) const {
    const int64_t* bound = find(size);
    if (!bound) throw std::out_of_range("no argument has the size " + std::string(size));
    return *bound;
  }

  [[noreturn]] void fail(const std::string& name, const std::string& what) const {
    throw pybind11::value_error("[" + op_ + "] " + name + ": " + what);
  }

 private:
  pybind11::object field(const pybind11::object& sums, const char* name) const {
    const auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttrString(sums.ptr(), name));
    if (found) return found;
    PyErr_Clear();
    fail(name, "expected a field of the sums");
  }

  // No stream waits: order is the caller's. torch's own __dlpack__ would make its default stream wait, which no CUDA
  // graph may record.
  Tensor borrow(const char* name, const pybind11::object& object) const {
    Tensor tensor{{}, object, nullptr, Dtype::other};
    if (const DLPackExchangeAPI* api = exchange_of(object)) {
      if (api->dltensor_from_py_object_no_sync(object.ptr(), &tensor.lent)) throw pybind11::error_already_set();
    } else {
      tensor.owner = in_capsule(name, object);
      tensor.lent = tensor.owner->dl_tensor;
    }
    tensor.dtype = dtype_of(tensor.lent.dtype);
    return tensor;
  }

  std::shared_ptr<DLManagedTensor> in_capsule(const char* name, const pybind11::object& object) const {
    if (!pybind11::hasattr(object, "__dlpack__")) fail(name, "expected a tensor");
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
    return std::shared_ptr<DLManagedTensor>(managed, release);
  }

  void check_device(const char* name, const DLDevice& device) {
    if (device.device_type != kDLCPU && device.device_type != kDLCUDA) fail(name, "expected a CPU or CUDA tensor");
    if (!bound_) device_ = device;
    bound_ = true;
    if (device.device_type != device_.device_type || device.device_id != device_.device_id)
      fail(name, "expected all tensors on one device");
  }

  // "T K" names sizes, "E+1" is one more than E, a number is itself.
  void check_shape(const char* name, const DLTensor& t, std::string_view dims) {
    const std::vector<std::string_view> words = split(dims);
    if (static_cast<size_t>(t.ndim) != words.size()) {
      std::vector<std::string> got;
      for (int32_t i = 0; i < t.ndim; ++i) got.push_back(std::to_string(t.shape[i]));
      fail(name, "expected shape " + listed({words.begin(), words.end()}) + ", got " + listed(got));
    }
    for (int32_t i = 0; i < t.ndim; ++i) {
      const size_t plus = words[i].find('+');
      const int64_t extra = plus == std::string_view::npos ? 0 : number(words[i].substr(plus + 1));
      const std::string_view size = words[i].substr(0, plus);
      const bool is_number = size.find_first_not_of("0123456789") == std::string_view::npos;
      const int64_t want = extra + (is_number ? number(size) : bound(size, t.shape[i] - extra));
      if (t.shape[i] != want)
        fail(name, "expected " + (is_number ? "" : std::string(words[i]) + "=") + std::to_string(want) + ", got " +
                       std::to_string(t.shape[i]));
    }
  }

  static std::vector<std::string_view> split(std::string_view text) {
    std::vector<std::string_view> words;
    for (size_t start = 0; start < text.size();) {
      const size_t stop = std::min(text.find(' ', start), text.size());
      words.push_back(text.substr(start, stop - start));
      start = stop + 1;
    }
    return words;
  }

  static int64_t number(std::string_view digits) {
    int64_t value = 0;
    for (const char digit : digits) value = 10 * value + (digit - '0');
    return value;
  }

  const int64_t* find(std::string_view size) const {
    for (const auto& [name, bound] : sizes_)
      if (name == size) return &bound;
    return nullptr;
  }

  int64_t bound(std::string_view size, int64_t to) {
    if (const int64_t* bound = find(size)) return *bound;
    sizes_.emplace_back(size, std::max<int64_t>(to, 0));
    return sizes_.back().second;
  }

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
  std::vector<std::pair<std::string, int64_t>> sizes_;
  std::vector<Tensor> held_;
  DLDevice device_{};
  bool bound_ = false;
};

}  // namespace moekern
