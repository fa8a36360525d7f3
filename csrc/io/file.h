#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace moekern::io {

struct Error : std::runtime_error {
  Error(int code, const std::string& message, std::string path);
  int code;  // errno
  std::string path;
};

// Throws what errno says about `path`.
[[noreturn]] void fail(const std::string& path);

// An open file. Reads and writes are whole or throw Error; EINTR and short transfers are no errors.
class File {
 public:
  File(const std::string& path, int flags);
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();

  int fd() const { return fd_; }
  const std::string& path() const { return path_; }

  // A file that ends before offset + length is an EIO that says where.
  void read(char* to, int64_t length, int64_t offset) const;
  void write(const char* from, int64_t length, int64_t offset) const;
  // fsync and close, with their errors.
  void finish();
  [[noreturn]] void ends_at(int64_t offset) const;

 private:
  std::string path_;
  int fd_;
};

}  // namespace moekern::io
