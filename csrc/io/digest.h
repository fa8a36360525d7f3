#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace moekern::io {

using Span = std::pair<int64_t, int64_t>;  // first byte and the byte past the last, in the file that is written
using Digest = std::array<unsigned char, 16>;  // XXH3-128, canonical (big-endian) bytes

// XXH3-128 of bytes as they come.
class Xxh3 {
 public:
  Xxh3();
  ~Xxh3();
  void reset();
  void update(const char* data, int64_t length);
  Digest digest() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The checksums of spans of a file whose bytes pass by in rising order, some of them unseen (cloned, or in a hole): a
// span gets a digest when all of its bytes were seen.
class Digests {
 public:
  // Spans rise and do not overlap; they are borrowed.
  explicit Digests(const std::vector<Span>& spans);
  void feed(int64_t position, const char* data, int64_t length);
  // One for each span. Call once, at the end.
  std::vector<std::optional<Digest>> take();

 private:
  void close_until(int64_t position);

  Xxh3 hash_;
  const std::vector<Span>& spans_;
  std::vector<std::optional<Digest>> digests_;
  size_t current_ = 0;
  int64_t seen_ = 0;  // bytes of the current span
};

}  // namespace moekern::io
