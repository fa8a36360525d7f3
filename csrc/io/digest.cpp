#include "digest.h"

#include <algorithm>
#include <limits>

#define XXH_INLINE_ALL
#include "../vendored/xxhash.h"

namespace moekern::io {

struct Xxh3::State {
  XXH3_state_t xxh;
};

Xxh3::Xxh3() : state_(new State) {
  XXH3_INITSTATE(&state_->xxh);
  reset();
}

Xxh3::~Xxh3() = default;

void Xxh3::reset() { XXH3_128bits_reset(&state_->xxh); }

void Xxh3::update(const char* data, int64_t length) {
  XXH3_128bits_update(&state_->xxh, data, static_cast<size_t>(length));
}

Digest Xxh3::digest() const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&state_->xxh));
  Digest digest;
  std::copy(std::begin(canonical.digest), std::end(canonical.digest), digest.begin());
  return digest;
}

Digests::Digests(const std::vector<Span>& spans) : spans_(spans) { digests_.reserve(spans.size()); }

void Digests::close_until(int64_t position) {
  for (; current_ < spans_.size() && spans_[current_].second <= position; ++current_) {
    digests_.emplace_back();
    if (seen_ == spans_[current_].second - spans_[current_].first) digests_.back() = hash_.digest();
    hash_.reset();
    seen_ = 0;
  }
}

void Digests::feed(int64_t position, const char* data, int64_t length) {
  const int64_t stop = position + length;
  close_until(position);
  while (current_ < spans_.size() && spans_[current_].first < stop) {
    const int64_t from = std::max(position, spans_[current_].first), to = std::min(stop, spans_[current_].second);
    hash_.update(data + (from - position), to - from);
    seen_ += to - from;
    if (to == stop) return;
    close_until(to);
  }
}

std::vector<std::optional<Digest>> Digests::take() {
  close_until(std::numeric_limits<int64_t>::max());
  return std::move(digests_);
}

}  // namespace moekern::io
