#pragma once
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace io {

// Bytes of the file to write: a range of a source file, or bytes that the caller holds.
struct Piece {
  std::string source;  // empty: literal
  int64_t offset = 0;
  int64_t length = 0;
  const char* literal = nullptr;  // borrowed
};

struct Error : std::runtime_error {
  Error(int code, const std::string& message, std::string path);
  int code;  // errno
  std::string path;
};

// Writes the pieces one after the other into a new file and fsyncs it. The mode honours the umask.
// Memory: one buffer of 8 MiB. `written` is called with the bytes so far after every buffer; what it throws ends the
// writing. A file that exists, a source that ends too early and every failed system call throw Error.
void write_file(const std::string& path, const std::vector<Piece>& pieces,
                const std::function<void(int64_t)>& written);

}  // namespace io
