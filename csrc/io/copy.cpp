#include "copy.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <utility>

namespace io {

Error::Error(int code, const std::string& message, std::string path)
    : std::runtime_error(message), code(code), path(std::move(path)) {}

namespace {

constexpr int64_t kBufferBytes = int64_t{8} << 20;

[[noreturn]] void fail(const std::string& path) {
  const int code = errno;
  throw Error(code, std::strerror(code), path);
}

class File {
 public:
  File(const std::string& path, int flags) : path_(path), fd_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    if (fd_ < 0) fail(path_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }

  void read(char* to, int64_t length, int64_t offset) const {
    while (length > 0) {
      const ssize_t got = ::pread(fd_, to, static_cast<size_t>(length), offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(path_);
      if (got == 0) throw Error(EIO, "ends at byte " + std::to_string(offset) + ", more was expected", path_);
      to += got;
      offset += got;
      length -= got;
    }
  }

  void write(const char* from, int64_t length, int64_t offset) const {
    const int64_t start = offset, stop = offset + length;
    while (offset < stop) {
      const ssize_t put = ::pwrite(fd_, from, static_cast<size_t>(stop - offset), offset);
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) fail(path_);
      from += put;
      offset += put;
    }
#ifdef __linux__
    // Starts the write-back now, so that the fsync at the end has little left to wait for; a hint, so it may fail.
    ::sync_file_range(fd_, start, length, SYNC_FILE_RANGE_WRITE);
#else
    (void)start;
#endif
  }

  void finish() {
    if (::fsync(fd_) != 0) fail(path_);
    if (::close(std::exchange(fd_, -1)) != 0) fail(path_);
  }

 private:
  std::string path_;
  int fd_;
};

}  // namespace

void write_file(const std::string& path, const std::vector<Piece>& pieces,
                const std::function<void(int64_t)>& written) {
  std::map<std::string, File> sources;
  File out(path, O_WRONLY | O_CREAT | O_EXCL);
  int64_t total = 0;
  for (const Piece& piece : pieces) total += piece.length;
  const int64_t capacity = std::min(total, kBufferBytes);
  const std::unique_ptr<char[]> buffer(new char[static_cast<size_t>(std::max<int64_t>(capacity, 1))]);
  int64_t filled = 0, flushed = 0;

  const auto flush = [&] {
    if (filled == 0) return;
    out.write(buffer.get(), filled, flushed);
    flushed += filled;
    filled = 0;
    written(flushed);
  };
  for (const Piece& piece : pieces) {
    for (int64_t done = 0; done < piece.length;) {
      const int64_t n = std::min(piece.length - done, capacity - filled);
      if (piece.literal != nullptr) {
        std::memcpy(buffer.get() + filled, piece.literal + done, static_cast<size_t>(n));
      } else {
        const File& source = sources.try_emplace(piece.source, piece.source, O_RDONLY).first->second;
        source.read(buffer.get() + filled, n, piece.offset + done);
      }
      done += n;
      filled += n;
      if (filled == capacity) flush();
    }
  }
  flush();
  out.finish();
}

}  // namespace io
