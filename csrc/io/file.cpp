#include "file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace moekern::io {

Error::Error(int code, const std::string& message, std::string path)
    : std::runtime_error(message), code(code), path(std::move(path)) {}

void fail(const std::string& path) {
  const int code = errno;
  throw Error(code, std::strerror(code), path);
}

File::File(const std::string& path, int flags) : path_(path), fd_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
  if (fd_ < 0) fail(path_);
}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

void File::read(char* to, int64_t length, int64_t offset) const {
  while (length > 0) {
    const ssize_t got = ::pread(fd_, to, static_cast<size_t>(length), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path_);
    if (got == 0) ends_at(offset);
    to += got;
    offset += got;
    length -= got;
  }
}

void File::write(const char* from, int64_t length, int64_t offset) const {
  while (length > 0) {
    const ssize_t put = ::pwrite(fd_, from, static_cast<size_t>(length), offset);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail(path_);
    from += put;
    offset += put;
    length -= put;
  }
}

void File::finish() {
  if (::fsync(fd_) != 0) fail(path_);
  if (::close(std::exchange(fd_, -1)) != 0) fail(path_);
}

void File::ends_at(int64_t offset) const {
  throw Error(EIO, "ends at byte " + std::to_string(offset) + ", more was expected", path_);
}

}  // namespace moekern::io
