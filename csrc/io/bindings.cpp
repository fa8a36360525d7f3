#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "copy.h"
#include "digest.h"
#include "file.h"

namespace py = pybind11;

namespace moekern {
namespace {

// What a function of the caller gives, held by its buffer. Needs no GIL, and letting go needs none.
std::shared_ptr<const char> made_by(const py::handle& function, int64_t length) {
  const py::gil_scoped_acquire gil;
  const py::object bytes = function();
  const auto release = [](Py_buffer* view) {
    const py::gil_scoped_acquire held;
    PyBuffer_Release(view);
    delete view;
  };
  auto view = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(bytes.ptr(), view.get(), PyBUF_SIMPLE) != 0) throw py::error_already_set();
  const std::shared_ptr<Py_buffer> owner(view.release(), release);
  if (owner->len != length) {
    throw py::value_error("[write_file] pieces: expected " + std::to_string(length) + " bytes from the function, got " +
                          std::to_string(owner->len));
  }
  return {owner, static_cast<const char*>(owner->buf)};
}

// Columns of a matrix: int64 numbers, as bytes.
io::Piece columns_from(const py::tuple& item) {
  io::Piece piece;
  piece.source = item[0].cast<std::string>();
  piece.offset = item[1].cast<int64_t>();
  const int64_t rows = item[2].cast<int64_t>();
  piece.width = item[3].cast<int64_t>();
  piece.column_bytes = item[4].cast<int64_t>();
  const std::string columns = item[5].cast<py::bytes>();
  piece.columns.resize(columns.size() / sizeof(int64_t));
  std::memcpy(piece.columns.data(), columns.data(), piece.columns.size() * sizeof(int64_t));
  bool good = piece.offset >= 0 && rows >= 0 && piece.column_bytes > 0 && !piece.columns.empty() &&
              columns.size() % sizeof(int64_t) == 0;
  for (size_t k = 0; k < piece.columns.size(); ++k) {
    good = good && piece.columns[k] > (k == 0 ? -1 : piece.columns[k - 1]) && piece.columns[k] < piece.width;
  }
  if (!good) throw py::value_error("[write_file] pieces: expected columns that rise within the width, and sizes above 0");
  piece.length = rows * static_cast<int64_t>(piece.columns.size()) * piece.column_bytes;
  return piece;
}

io::Piece piece_from(const py::handle& item) {
  io::Piece piece;
  if (py::isinstance<py::bytes>(item)) {
    piece.literal = PyBytes_AS_STRING(item.ptr());
    piece.length = PyBytes_GET_SIZE(item.ptr());
    return piece;
  }
  if (py::isinstance<py::tuple>(item) && py::len(item) == 6) return columns_from(item.cast<py::tuple>());
  if (!py::isinstance<py::tuple>(item) || py::len(item) != 3) {
    throw py::type_error(
        "[write_file] pieces: expected bytes, (path, offset, length), (name, length, function) or "
        "(path, offset, rows, width, column bytes, columns)");
  }
  const py::object last = item.cast<py::tuple>()[2];
  if (PyCallable_Check(last.ptr())) {
    piece.length = item.cast<py::tuple>()[1].cast<int64_t>();
    if (piece.length < 0) throw py::value_error("[write_file] pieces: expected length >= 0");
    piece.make = [function = py::handle(last), length = piece.length] { return made_by(function, length); };
    return piece;
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

io::Copy copy_named(const std::string& name) {
  if (name == "stream") return io::Copy::stream;
  if (name == "kernel") return io::Copy::kernel;
  if (name == "reflink") return io::Copy::reflink;
  if (name == "reflink_or_stream") return io::Copy::reflink_or_stream;
  throw py::value_error("[write_file] copy: expected stream, kernel, reflink or reflink_or_stream, got " + name);
}

void check_spans(const std::vector<io::Span>& spans) {
  int64_t end = 0;
  for (const auto& [start, stop] : spans) {
    if (start < end || stop < start) throw py::value_error("[write_file] spans: expected rising, disjoint spans");
    end = stop;
  }
}

py::bytes bytes_of(const io::Digest& digest) {
  return py::bytes(reinterpret_cast<const char*>(digest.data()), digest.size());
}

py::tuple write_file(const std::string& path, const py::list& items, const std::vector<io::Span>& spans,
                     const std::string& copy, const py::object& progress) {
  const io::Copy mode = copy_named(copy);
  check_spans(spans);
  // A copy of the list keeps every literal and function alive while the GIL is released.
  const py::list held(items[py::slice(0, static_cast<py::ssize_t>(items.size()), 1)]);
  std::vector<io::Piece> pieces;
  pieces.reserve(held.size());
  for (const py::handle item : held) pieces.push_back(piece_from(item));
  const auto written = [&](int64_t bytes) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(bytes);
  };
  io::Written made;
  {
    const py::gil_scoped_release nogil;
    made = io::write_file(path, pieces, spans, mode, written);
  }
  py::list digests;
  for (const auto& digest : made.digests) {
    if (digest) {
      digests.append(bytes_of(*digest));
    } else {
      digests.append(py::none());
    }
  }
  return py::make_tuple(made.cloned, made.holes, made.copied, digests);
}

void update(io::Xxh3& hash, const py::buffer& data) {
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  {
    const py::gil_scoped_release nogil;
    hash.update(static_cast<const char*>(view.buf), view.len);
  }
  PyBuffer_Release(&view);
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
  m.def("write_file", &write_file, py::arg("path"), py::arg("pieces"), py::arg("spans") = std::vector<io::Span>(),
        py::arg("copy") = "stream", py::arg("progress") = py::none(),
        "Write a new file from pieces, each (source path, offset, length), bytes, or (name, length, function that gives "
        "the bytes, called when their turn comes) or (source path, offset, rows, width, bytes of a column, columns that "
        "stay, int64 in bytes) of a matrix, and fsync it. Returns the bytes that were cloned, that stayed holes "
        "and that were copied, and for each span (start, stop) of the file its XXH3-128, or None where not all of its "
        "bytes passed through memory.");
  m.def("probe_copy", &io::probe, py::arg("source"), py::arg("folder"), py::call_guard<py::gil_scoped_release>(),
        "The best way to copy from `source` into new files of `folder`: reflink, kernel or stream.");
  py::class_<io::Xxh3>(m, "Xxh3", "XXH3-128 of bytes as they come, as write_file takes it.")
      .def(py::init())
      .def("update", &update, py::arg("data"))
      .def("digest", [](const io::Xxh3& hash) { return bytes_of(hash.digest()); }, "16 bytes, big-endian.");
}

}  // namespace moekern
