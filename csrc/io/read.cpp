#include "read.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "file.h"

namespace moekern::io {
namespace {

constexpr int64_t kPage = 4096;               // what O_DIRECT asks of offsets, lengths and addresses at most
constexpr int64_t kItemBytes = int64_t{4} << 20;
constexpr int64_t kDirectBytes = int64_t{64} << 10;  // below, a direct read saves nothing
constexpr int64_t kFolioBytes = int64_t{2} << 20;    // the page cache drops a large page as a whole or not at all
constexpr size_t kMaxPieces = 256;                   // of memory in one preadv; IOV_MAX is 1024

int64_t down(int64_t n, int64_t unit) { return n / unit * unit; }
int64_t up(int64_t n, int64_t unit) { return down(n + unit - 1, unit); }

class Source {
 public:
  Source(const std::string& path, bool keep_cache) : path_(path), cached_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (cached_ < 0) fail(path_);
#ifdef __linux__
    ::posix_fadvise(cached_, 0, 0, POSIX_FADV_SEQUENTIAL);
    if (!keep_cache) direct_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
#else
    (void)keep_cache;
#endif
  }
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;
  ~Source() {
    ::close(cached_);
    if (direct_ >= 0) ::close(direct_);
  }

  const std::string& path() const { return path_; }
  bool has_direct() const { return direct_ >= 0; }

  // Bytes read past the page cache; fewer than asked for where the file system, the alignment or the file's end forbid.
  int64_t read_direct(char* to, int64_t length, int64_t offset) const {
    int64_t done = 0;
    while (done < length && done % kPage == 0) {
      const ssize_t got = ::pread(direct_, to + done, static_cast<size_t>(length - done), offset + done);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;
      done += got;
    }
    return done;
  }

  void read_cached(std::vector<iovec> pieces, int64_t offset) const {
    for (size_t first = 0; first < pieces.size();) {
      const ssize_t got = ::preadv(cached_, &pieces[first], static_cast<int>(pieces.size() - first), offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(path_);
      if (got == 0) throw Error(EIO, "ends at byte " + std::to_string(size(offset)) + ", more was expected", path_);
      offset += got;
      size_t left = static_cast<size_t>(got);
      for (; first < pieces.size() && left >= pieces[first].iov_len; ++first) left -= pieces[first].iov_len;
      if (left > 0) {
        pieces[first].iov_base = static_cast<char*>(pieces[first].iov_base) + left;
        pieces[first].iov_len -= left;
      }
    }
  }

  // Drops the pages that lie within; a hint, so it may fail.
  void drop(int64_t offset, int64_t length) const {
#ifdef __linux__
    ::posix_fadvise(cached_, offset, length, POSIX_FADV_DONTNEED);
#else
    (void)offset, (void)length;
#endif
  }

 private:
  // Of a file that ended before byte `at`: another thread may have met its end long before.
  int64_t size(int64_t at) const {
    struct stat status;
    return ::fstat(cached_, &status) == 0 ? std::min<int64_t>(status.st_size, at) : at;
  }

  std::string path_;
  int cached_ = -1, direct_ = -1;
};

// Consecutive bytes of a file, read with one call.
struct Item {
  const Source* source;
  int64_t offset, length;
  std::vector<iovec> pieces;
  bool direct;
};

char* address(const iovec& piece) { return static_cast<char*>(piece.iov_base); }

void add(std::vector<Item>& items, const Source& source, int64_t offset, char* to, int64_t length, bool direct) {
  const iovec piece{to, static_cast<size_t>(length)};
  if (!items.empty() && !direct) {
    Item& last = items.back();
    const bool follows = last.source == &source && last.offset + last.length == offset;
    if (follows && !last.direct && offset % kItemBytes != 0 && last.pieces.size() < kMaxPieces) {
      last.length += length;
      last.pieces.push_back(piece);
      return;
    }
  }
  items.push_back({&source, offset, length, {piece}, direct});
}

// Cuts bytes that are consecutive in file and memory where the file's offset is a multiple of an item, so that no two
// items share a page but where the bytes begin and end; there the whole pages in between may be read directly.
void cut(std::vector<Item>& items, const Source& source, const Range& range) {
  const int64_t stop = range.offset + range.length;
  const int64_t head = up(range.offset, kPage), tail = down(stop, kPage);
  const bool agrees = (reinterpret_cast<intptr_t>(range.to) - range.offset) % kPage == 0;
  const bool direct = agrees && source.has_direct() && tail - head >= kDirectBytes;
  for (int64_t at = range.offset; at < stop;) {
    int64_t next = std::min(stop, down(at, kItemBytes) + kItemBytes);
    if (direct) next = at < head ? head : at >= tail ? stop : std::min(next, tail);
    add(items, source, at, range.to + (at - range.offset), next - at, direct && at >= head && at < tail);
    at = next;
  }
}

std::vector<Item> plan(std::vector<Range> ranges, std::deque<Source>& sources, bool keep_cache) {
  ranges.erase(std::remove_if(ranges.begin(), ranges.end(), [](const Range& r) { return r.length == 0; }),
               ranges.end());
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return a.path != b.path ? a.path < b.path : a.offset < b.offset;
  });
  std::vector<Item> items;
  for (size_t first = 0; first < ranges.size();) {
    Range joined = ranges[first++];
    for (; first < ranges.size(); ++first) {
      const Range& next = ranges[first];
      if (next.path != joined.path || next.offset != joined.offset + joined.length ||
          next.to != joined.to + joined.length) {
        break;
      }
      joined.length += next.length;
    }
    if (sources.empty() || sources.back().path() != joined.path) sources.emplace_back(joined.path, keep_cache);
    cut(items, sources.back(), joined);
  }
  return items;
}

void read(const Item& item, bool keep_cache) {
  int64_t done = 0;
  if (item.direct) done = item.source->read_direct(address(item.pieces[0]), item.length, item.offset);
  if (done == item.length) return;
  std::vector<iovec> pieces = item.pieces;
  if (done > 0) pieces[0] = {address(pieces[0]) + done, static_cast<size_t>(item.length - done)};
  item.source->read_cached(std::move(pieces), item.offset + done);
  if (!keep_cache) item.source->drop(item.offset, item.length);
}

class Readers {
 public:
  Readers(const std::vector<Item>& items, int threads, bool keep_cache) : items_(items), keep_cache_(keep_cache) {
    const size_t count = std::min(static_cast<size_t>(std::max(threads, 1)), items.size());
    running_ = count;
    try {
      while (threads_.size() < count) threads_.emplace_back([this] { work(); });
    } catch (...) {  // no thread left: those that started read everything
      if (threads_.empty()) throw;
      const std::lock_guard<std::mutex> lock(mutex_);
      running_ -= count - threads_.size();
    }
  }
  Readers(const Readers&) = delete;
  Readers& operator=(const Readers&) = delete;
  ~Readers() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

  void wait(const std::function<void(int64_t)>& progress) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!ended_.wait_for(lock, std::chrono::milliseconds(100), [this] { return running_ == 0; })) {
      lock.unlock();
      progress(bytes_);
      lock.lock();
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work() {
    try {
      for (size_t i = next_++; i < items_.size() && !stop_; i = next_++) {
        read(items_[i], keep_cache_);
        bytes_ += items_[i].length;
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      stop_ = true;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--running_ == 0) ended_.notify_all();
  }

  const std::vector<Item>& items_;
  const bool keep_cache_;
  std::atomic<size_t> next_{0};
  std::atomic<int64_t> bytes_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable ended_;
  size_t running_ = 0;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

}  // namespace

void read_ranges(std::vector<Range> ranges, int threads, bool keep_cache,
                 const std::function<void(int64_t)>& progress) {
  std::deque<Source> sources;
  const std::vector<Item> items = plan(std::move(ranges), sources, keep_cache);
  int64_t total = 0;
  for (const Item& item : items) total += item.length;
  {
    Readers readers(items, threads, keep_cache);
    readers.wait(progress);
  }
  for (const Item& item : items) {  // pages that two items share, and large pages that reach past an item
    if (keep_cache || item.direct) continue;
    const int64_t start = down(item.offset, kFolioBytes);
    item.source->drop(start, up(item.offset + item.length, kFolioBytes) - start);
  }
  progress(total);
}

}  // namespace moekern::io
