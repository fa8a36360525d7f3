#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "copy.h"

namespace py = pybind11;

namespace {

io::Piece piece_from(const py::handle& item) {
  io::Piece piece;
  if (py::isinstance<py::bytes>(item)) {
    piece.literal = PyBytes_AS_STRING(item.ptr());
    piece.length = PyBytes_GET_SIZE(item.ptr());
    return piece;
  }
  if (!py::isinstance<py::tuple>(item) || py::len(item) != 3) {
    throw py::type_error("[write_file] pieces: expected bytes or (path, offset, length)");
  }
  const auto [source, offset, length] = item.cast<std::tuple<std::string, int64_t, int64_t>>();
  if (offset < 0 || length < 0) {
    throw py::value_error("[write_file] pieces: expected offset and length >= 0, got " + std::to_string(offset) +
                          " and " + std::to_string(length));
  }
  piece.source = source;
  piece.offset = offset;
  piece.length = length;
  return piece;
}

void write_file(const std::string& path, const py::list& items, const py::object& progress) {
  // A copy of the list keeps every literal alive while the GIL is released.
  const py::list held(items[py::slice(0, static_cast<py::ssize_t>(items.size()), 1)]);
  std::vector<io::Piece> pieces;
  pieces.reserve(held.size());
  for (const py::handle item : held) pieces.push_back(piece_from(item));
  const auto written = [&](int64_t bytes) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(bytes);
  };
  const py::gil_scoped_release nogil;
  io::write_file(path, pieces, written);
}

void translate(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const io::Error& error) {
    const py::tuple arguments = py::make_tuple(error.code, error.what(), error.path);
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

}  // namespace

void bind_io(py::module_& m) {
  py::register_exception_translator(&translate);
  m.def("write_file", &write_file, py::arg("path"), py::arg("pieces"), py::arg("progress") = py::none(),
        "Write a new file from pieces, each (source path, offset, length) or bytes, and fsync it.");
}
