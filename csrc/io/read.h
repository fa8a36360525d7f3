#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace moekern::io {

// Bytes of a file, and the memory that they are read into.
struct Range {
  std::string path;
  int64_t offset = 0;
  int64_t length = 0;
  char* to = nullptr;  // borrowed, `length` bytes
};

// Fills the memory of all ranges with `threads` threads. Ranges are read in file order; those that touch in a file are
// read as one, wherever their memory is. What is read leaves the page cache as it was, up to the kernel's read-ahead:
// bytes whose address and offset agree modulo 4096 are read past it (O_DIRECT) where the file system can, others are
// dropped from it behind the cursor. With `keep_cache` everything is read through the cache and stays there.
// `progress` is called by the calling thread with the bytes read so far, every tenth of a second; what it throws ends
// the reading. A file that ends inside a range and every failed system call throw Error; no thread is left behind.
void read_ranges(std::vector<Range> ranges, int threads, bool keep_cache, const std::function<void(int64_t)>& progress);

}  // namespace moekern::io
