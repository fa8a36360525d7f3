#include "copy.h"

#include <fcntl.h>
#include <unistd.h>

#include "chunks.h"
#include "file.h"
#include "ring.h"

namespace moekern::io {

Written write_file(const std::string& path, const std::vector<Piece>& pieces, const std::vector<Span>& spans, Copy copy,
                   const std::function<void(int64_t)>& written) {
  Sources sources;
  File out(path, O_WRONLY | O_CREAT | O_EXCL);
  int64_t total = 0;
  for (const Piece& piece : pieces) total += piece.length;
  // The full length at once: what is never written stays a hole, and ext4 writes a file that does not grow faster.
  if (::ftruncate(out.fd(), total) != 0) fail(path);
  const bool kernel = copy == Copy::kernel;
  const Chunks work = cut(pieces, sources, out, copy, kernel ? kKernelChunk : kRingChunk);
  const auto moved = [&](int64_t bytes) { written(work.cloned + work.holes + bytes); };
  Digests digests(spans);
  if (kernel) {
    copy_in_kernel(work, out, digests, moved);
  } else {
    copy_through_ring(work, out, digests, moved);
  }
  out.finish();
  written(total);
  return {work.cloned, work.holes, total - work.cloned - work.holes, digests.take()};
}

}  // namespace moekern::io
