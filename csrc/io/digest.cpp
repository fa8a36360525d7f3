#include "digest.h"

#include <algorithm>
#include <limits>

#define XXH_INLINE_ALL
#include "../vendored/xxhash.h"

namespace moekern::io {

struct Digests::State {
  XXH3_state_t xxh;
};

Digests::Digests(const std::vector<Span>& spans) : state_(new State), spans_(spans) {
  XXH3_INITSTATE(&state_->xxh);
  XXH3_128bits_reset(&state_->xxh);
  digests_.reserve(spans.size());
}

Digests::~Digests() = default;

void Digests::close_until(int64_t position) {
  for (; current_ < spans_.size() && spans_[current_].second <= position; ++current_) {
    digests_.emplace_back();
    if (seen_ == spans_[current_].second - spans_[current_].first) {
      XXH128_canonical_t canonical;
      XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&state_->xxh));
      std::copy(std::begin(canonical.digest), std::end(canonical.digest), digests_.back().emplace().begin());
    }
    XXH3_128bits_reset(&state_->xxh);
    seen_ = 0;
  }
}

void Digests::feed(int64_t position, const char* data, int64_t length) {
  const int64_t stop = position + length;
  close_until(position);
  while (current_ < spans_.size() && spans_[current_].first < stop) {
    const int64_t from = std::max(position, spans_[current_].first), to = std::min(stop, spans_[current_].second);
    XXH3_128bits_update(&state_->xxh, data + (from - position), static_cast<size_t>(to - from));
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
