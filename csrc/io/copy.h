#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "digest.h"

namespace moekern::io {

// Bytes of the file to write: a range of a source file, columns of a matrix in one, bytes that the caller holds, or bytes
// that `make` gives.
struct Piece {
  std::string source;  // empty: literal or made
  int64_t offset = 0;
  int64_t length = 0;
  // Those that stay, rising, of the `width` columns of a matrix at `offset`; empty: the whole range.
  std::vector<int64_t> columns;
  int64_t width = 0, column_bytes = 0;
  const char* literal = nullptr;  // borrowed
  // Called once, on the calling thread, when all before it is read; gives `length` bytes, which are let go before the
  // next piece is made. Not called for length 0.
  std::function<std::shared_ptr<const char>()> make;
};

// How ranges are copied. stream: through a ring of buffers. kernel: copy_file_range. reflink: the blocks that lie alike in
// source and output are shared (FICLONERANGE), the rest goes through the ring; a range that the file system will not share
// is an error. reflink_or_stream: such a range goes through the ring too.
enum class Copy { stream, kernel, reflink, reflink_or_stream };

struct Written {
  int64_t cloned = 0;  // bytes shared with the source
  int64_t holes = 0;   // bytes that stayed holes
  int64_t copied = 0;  // the other bytes
  std::vector<std::optional<Digest>> digests;  // one for each span
};

// Writes the pieces one after the other into a new file and fsyncs it. The mode honours the umask. Holes of the sources
// stay holes. Spans of the output whose bytes pass through memory get their checksum. Neither file stays in the page cache.
//
// `written` is called with the bytes so far from time to time, also while nothing moves; what it throws ends the writing.
// A file that exists, a source that ends too early and every failed system call throw Error.
Written write_file(const std::string& path, const std::vector<Piece>& pieces, const std::vector<Span>& spans, Copy copy,
                   const std::function<void(int64_t)>& written);

// The best way to copy from `source` into new files of `folder`: "reflink" where they can share blocks, "kernel" where a
// server copies between its own files, else "stream". Makes and removes a file.
std::string probe(const std::string& source, const std::string& folder);

}  // namespace moekern::io
