#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "read.h"

namespace py = pybind11;

namespace moekern {
namespace {

using Item = std::tuple<std::string, int64_t, int64_t, uintptr_t>;

void read_ranges(const std::vector<Item>& items, int threads, bool keep_cache, const py::object& progress) {
  if (threads < 1) throw py::value_error("[read_ranges] threads: expected 1 or more, got " + std::to_string(threads));
  std::vector<io::Range> ranges;
  ranges.reserve(items.size());
  for (const auto& [path, offset, length, address] : items) {
    if (offset < 0 || length < 0) {
      throw py::value_error("[read_ranges] ranges: expected offset and length >= 0, got " + std::to_string(offset) +
                            " and " + std::to_string(length));
    }
    ranges.push_back({path, offset, length, reinterpret_cast<char*>(address)});
  }
  const auto check = [&](int64_t bytes) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(bytes);
  };
  const py::gil_scoped_release nogil;
  io::read_ranges(std::move(ranges), threads, keep_cache, check);
}

}  // namespace

void bind_read(py::module_& m) {
  m.def("read_ranges", &read_ranges, py::arg("ranges"), py::arg("threads"), py::arg("keep_cache") = false,
        py::arg("progress") = py::none(),
        "Fill memory with ranges of files, each (path, offset, length, address), with several threads.");
}

}  // namespace moekern
