#pragma once
#include <functional>

#include "chunks.h"

namespace moekern::io {

// Fills the chunks of `out` through a ring of buffers: threads read, the calling thread makes what has to be made and takes
// checksums in order, a thread writes in order. `moved` is called on the calling thread with the bytes written so far, at least five times a second.
void copy_through_ring(const Chunks& work, const File& out, Digests& digests, const std::function<void(int64_t)>& moved);

// The same through copy_file_range on the calling thread. Literals and what is made are written, and have checksums.
void copy_in_kernel(const Chunks& work, const File& out, Digests& digests, const std::function<void(int64_t)>& moved);

constexpr int64_t kRingChunk = int64_t{4} << 20;
constexpr int64_t kKernelChunk = int64_t{64} << 20;

}  // namespace moekern::io
