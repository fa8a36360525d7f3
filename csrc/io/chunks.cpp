#include "chunks.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <memory>

#ifdef __linux__
#include <linux/fs.h>
#include <sys/vfs.h>
#endif

namespace moekern::io {

namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kMostGathered = int64_t{4} << 20;  // that a copy in the kernel holds

// False where the file system says that it cannot share these blocks.
bool clone(const File& source, int64_t offset, int64_t length, const File& out, int64_t position) {
#ifdef FICLONERANGE
  file_clone_range range{};
  range.src_fd = source.fd();
  range.src_offset = static_cast<uint64_t>(offset);
  range.src_length = static_cast<uint64_t>(length);
  range.dest_offset = static_cast<uint64_t>(position);
  while (::ioctl(out.fd(), FICLONERANGE, &range) != 0) {
    if (errno == EINTR) continue;
    if (errno == EINVAL || errno == EXDEV || errno == EOPNOTSUPP || errno == ENOTTY || errno == EPERM) return false;
    fail(out.path());
  }
  return true;
#else
  (void)source, (void)offset, (void)length, (void)out, (void)position;
  errno = ENOTSUP;
  return false;
#endif
}

// True for the file systems whose server can copy without sending the bytes here.
bool on_a_server(const File& file) {
#ifdef __linux__
  struct statfs status;
  if (::fstatfs(file.fd(), &status) != 0) return false;
  switch (static_cast<uint32_t>(status.f_type)) {
    case 0x6969:      // NFS
    case 0xFF534D42:  // CIFS
    case 0xFE534D42:  // SMB
    case 0x00C36400:  // Ceph
      return true;
  }
#else
  (void)file;
#endif
  return false;
}

bool copies_in_kernel(const File& source, const File& out) {
#ifdef __linux__
  loff_t from = 0, to = 0;
  return ::copy_file_range(source.fd(), &from, out.fd(), &to, 1, 0) == 1;
#else
  (void)source, (void)out;
  return false;
#endif
}

class Cutter {
 public:
  Cutter(const File& out, Copy copy, int64_t limit) : out_(out), copy_(copy), limit_(limit) {
    struct stat status;
    if (::fstat(out.fd(), &status) != 0) fail(out.path());
    block_ = std::max<int64_t>(status.st_blksize, kBlock);
  }

  void literal(const Piece& piece) {
    for (int64_t done = 0; done < piece.length;) done += add({nullptr, 0, piece.literal + done, piece.length - done});
  }

  void made(const Piece& piece) {
    for (int64_t done = 0; done < piece.length;) done += add({nullptr, done, nullptr, piece.length - done, &piece});
  }

  // Columns of whole blocks are ranges: wide ones are the rows of a matrix that loses rows.
  void gathered(const Piece& piece, const File& source) {
    if (piece.column_bytes < kBlock) {
      for (int64_t done = 0; done < piece.length;) {
        Part part{&source, done, nullptr, std::min(piece.length - done, kMostGathered)};
        part.gathered = &piece;
        done += add(part);
      }
      return;
    }
    const auto& columns = piece.columns;
    for (int64_t done = 0, row = piece.offset; done < piece.length; row += piece.width * piece.column_bytes)
      for (size_t first = 0, past; first < columns.size(); first = past) {
        for (past = first + 1; past < columns.size() && columns[past] == columns[past - 1] + 1;) ++past;
        const int64_t length = static_cast<int64_t>(past - first) * piece.column_bytes;
        range(source, row + columns[first] * piece.column_bytes, length);
        done += length;
      }
  }

  void range(const File& source, int64_t offset, int64_t length) {
    if (copy_ == Copy::reflink || copy_ == Copy::reflink_or_stream) {
      const int64_t head = std::min(length, (block_ - offset % block_) % block_);
      const int64_t middle = (length - head) / block_ * block_;
      if (middle > 0 && (offset - position_) % block_ == 0) {
        data(source, offset, head);
        if (clone(source, offset + head, middle, out_, position_)) {
          position_ += middle;
          made_.cloned += middle;
          return data(source, offset + head + middle, length - head - middle);
        }
        if (copy_ == Copy::reflink) fail(out_.path());
        return data(source, offset + head, length - head);
      }
    }
    data(source, offset, length);
  }

  Chunks take() { return std::move(made_); }

 private:
  // The data of a range; its holes are passed over.
  void data(const File& source, int64_t offset, int64_t length) {
    const int64_t stop = offset + length;
    while (offset < stop) {
      const int64_t start = std::min(stop, next(source, offset, SEEK_DATA, stop));
      made_.holes += start - offset;
      position_ += start - offset;
      offset = start;
      if (offset == stop) return;
      const int64_t end = std::min(stop, next(source, offset, SEEK_HOLE, stop));
      while (offset < end) offset += add({&source, offset, nullptr, end - offset});
    }
  }

  // Where data or a hole begins, at `offset` or after it; `stop` when there is none before the end of the file.
  int64_t next(const File& source, int64_t offset, int whence, int64_t stop) const {
    const off_t found = ::lseek(source.fd(), offset, whence);
    if (found >= 0) return found;
    if (errno == ENXIO) {  // `offset` lies in the last hole, or past the end of a file that was cut short
      struct stat status;
      if (::fstat(source.fd(), &status) != 0) fail(source.path());
      if (status.st_size < stop) source.ends_at(status.st_size);
      return stop;
    }
    if (errno == EINVAL || errno == EOPNOTSUPP) return whence == SEEK_DATA ? offset : stop;  // holes are not told
    fail(source.path());
  }

  // Adds the beginning of a part, as much as its chunk has room for.
  int64_t add(Part part) {
    auto& chunks = made_.chunks;
    const bool fresh = chunks.empty() || chunks.back().length == limit_ ||
                       chunks.back().position + chunks.back().length != position_ || chunks.back().made != part.made;
    if (fresh) chunks.push_back({position_, 0, made_.parts.size(), made_.parts.size(), part.made});
    Chunk& chunk = chunks.back();
    part.length = std::min(part.length, limit_ - chunk.length);
    made_.parts.push_back(part);
    ++chunk.last;
    chunk.length += part.length;
    position_ += part.length;
    return part.length;
  }

  const File& out_;
  const Copy copy_;
  const int64_t limit_;
  int64_t block_;
  int64_t position_ = 0;
  Chunks made_;
};

}  // namespace

Chunks cut(const std::vector<Piece>& pieces, Sources& sources, const File& out, Copy copy, int64_t limit) {
  Cutter cutter(out, copy, limit);
  for (const Piece& piece : pieces) {
    if (piece.literal != nullptr) {
      cutter.literal(piece);
    } else if (piece.make) {
      cutter.made(piece);
    } else if (piece.length > 0) {
      const File& source = sources.try_emplace(piece.source, piece.source, O_RDONLY).first->second;
      piece.columns.empty() ? cutter.range(source, piece.offset, piece.length) : cutter.gathered(piece, source);
    }
  }
  return cutter.take();
}

// A new file without a name, that nothing has to remove, not even after a kill where the file system has such files.
static std::unique_ptr<const File> nameless(const std::string& folder) {
#ifdef O_TMPFILE
  try {
    return std::make_unique<const File>(folder, O_TMPFILE | O_WRONLY);
  } catch (const Error& error) {
    if (error.code != EOPNOTSUPP && error.code != EISDIR && error.code != EINVAL && error.code != ENOENT) throw;
  }
#endif
  std::string name = folder + "/.moekern-probe-XXXXXX";
  const int fd = ::mkostemp(name.data(), O_CLOEXEC);
  if (fd < 0) fail(folder);
  ::close(fd);
  const auto unlink = [](const std::string* path) { ::unlink(path->c_str()); };
  const std::unique_ptr<const std::string, decltype(unlink)> remove(&name, unlink);
  return std::make_unique<const File>(name, O_WRONLY);
}

std::string probe(const std::string& source, const std::string& folder) {
  const File from(source, O_RDONLY);
  const std::unique_ptr<const File> unnamed = nameless(folder);
  const File& to = *unnamed;
  struct stat status;
  if (::fstat(to.fd(), &status) != 0) fail(folder);
  const int64_t block = std::max<int64_t>(status.st_blksize, kBlock);
  if (::fstat(from.fd(), &status) != 0) fail(source);
  if (status.st_size >= block && clone(from, 0, block, to, 0)) return "reflink";
  return on_a_server(from) && on_a_server(to) && copies_in_kernel(from, to) ? "kernel" : "stream";
}

}  // namespace moekern::io
