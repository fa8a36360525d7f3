#include "ring.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "gather.h"

namespace moekern::io {

namespace {

constexpr size_t kSlots = 8;
constexpr int kReaders = 2;
constexpr size_t kLag = 4;  // chunks that may wait for the disk before the writer waits for them

// Starts the write-back of a chunk, and makes the one `kLag` chunks ago leave the page cache: the fsync at the end has
// little left to wait for, and nothing that others need is pushed out of memory. All hints, so they may fail.
class WriteBehind {
 public:
  explicit WriteBehind(const File& out) : out_(out) {}

  void wrote(int64_t position, int64_t length) {
#ifdef __linux__
    ::sync_file_range(out_.fd(), position, length, SYNC_FILE_RANGE_WRITE);
    pending_.emplace_back(position, length);
    if (pending_.size() <= kLag) return;
    const auto [start, size] = pending_.front();
    pending_.pop_front();
    ::sync_file_range(out_.fd(), start, size,
                      SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    ::posix_fadvise(out_.fd(), start, size, POSIX_FADV_DONTNEED);
#else
    (void)position, (void)length;
#endif
  }

 private:
  const File& out_;
  std::deque<std::pair<int64_t, int64_t>> pending_;
};

void done_with(const Part& part) {
#ifdef __linux__
  if (!part.source) return;
  const auto [start, stop] = part.gathered ? extent(part) : std::pair(part.offset, part.offset + part.length);
  ::posix_fadvise(part.source->fd(), start, stop - start, POSIX_FADV_DONTNEED);
#else
  (void)part;
#endif
}

class Ring {
 public:
  Ring(const Chunks& work, const File& out) : work_(work), out_(out) {
    void* memory = nullptr;
    const size_t slots = std::min(kSlots, work.chunks.size());
    if (::posix_memalign(&memory, 4096, slots * kRingChunk) != 0) throw std::bad_alloc();
    buffer_.reset(static_cast<char*>(memory));
  }

  void run(Digests& digests, const std::function<void(int64_t)>& moved) {
    std::vector<std::thread> threads;
    try {
      threads.emplace_back([this] { guarded([this] { write(); }); });
      for (int i = 0; i < kReaders; ++i) threads.emplace_back([this] { guarded([this] { read(); }); });
      hash(digests, moved);
    } catch (...) {
      stop(std::current_exception());
    }
    for (std::thread& thread : threads) thread.join();
    if (error_) std::rethrow_exception(error_);
    moved(moved_);
  }

 private:
  char* slot(size_t chunk) const { return buffer_.get() + (chunk % kSlots) * kRingChunk; }

  template <typename Function>
  void guarded(Function&& function) {
    try {
      function();
    } catch (...) {
      stop(std::current_exception());
    }
  }

  void stop(std::exception_ptr error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = error;
    changed_.notify_all();
  }

  template <typename Condition>
  bool wait(std::unique_lock<std::mutex>& lock, Condition&& condition) {
    changed_.wait(lock, [&] { return error_ || condition(); });
    return !error_;
  }

  void read() {
    Gatherer gatherer;
    std::unique_lock<std::mutex> lock(mutex_);
    while (to_read_ < work_.chunks.size()) {
      const size_t chunk = to_read_++;
      if (work_.chunks[chunk].made) continue;
      if (!wait(lock, [&] { return chunk < written_ + kSlots; })) return;
      lock.unlock();
      char* at = slot(chunk);
      for (size_t i = work_.chunks[chunk].first; i < work_.chunks[chunk].last; ++i) {
        const Part& part = work_.parts[i];
        if (part.source) {
          part.gathered ? gatherer.read(part, at) : part.source->read(at, part.length, part.offset);
          done_with(part);
        } else {
          std::memcpy(at, part.literal, static_cast<size_t>(part.length));
        }
        at += part.length;
      }
      lock.lock();
      ready_[chunk % kSlots] = true;
      changed_.notify_all();
    }
  }

  void hash(Digests& digests, const std::function<void(int64_t)>& moved) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (written_ < work_.chunks.size() && !error_) {
      const bool come = changed_.wait_for(lock, std::chrono::milliseconds(200), [this] {
        return error_ || written_ == work_.chunks.size() || next_is_ready();
      });
      const int64_t so_far = moved_;
      const bool ready = come && !error_ && next_is_ready();
      lock.unlock();
      if (ready && work_.chunks[hashed_].made) make(work_.chunks[hashed_]);
      if (ready) digests.feed(work_.chunks[hashed_].position, slot(hashed_), work_.chunks[hashed_].length);
      moved(so_far);
      lock.lock();
      if (ready) {
        ready_[hashed_ % kSlots] = false;
        ++hashed_;
        changed_.notify_all();
      }
    }
  }

  // The next chunk to hash has been read; or there is a slot for what the calling thread makes of it.
  bool next_is_ready() const {
    if (hashed_ == work_.chunks.size()) return false;
    return work_.chunks[hashed_].made ? hashed_ < written_ + kSlots : ready_[hashed_ % kSlots];
  }

  void make(const Chunk& chunk) {
    const Part& part = work_.parts[chunk.first];
    std::memcpy(slot(hashed_), making_.at(part), static_cast<size_t>(part.length));
    making_.done(part);
  }

  void write() {
    WriteBehind behind(out_);
    std::unique_lock<std::mutex> lock(mutex_);
    while (written_ < work_.chunks.size()) {
      if (!wait(lock, [this] { return hashed_ > written_; })) return;
      const Chunk& chunk = work_.chunks[written_];
      lock.unlock();
      out_.write(slot(written_), chunk.length, chunk.position);
      behind.wrote(chunk.position, chunk.length);
      lock.lock();
      ++written_;
      moved_ += chunk.length;
      changed_.notify_all();
    }
  }

  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };

  const Chunks& work_;
  const File& out_;
  std::unique_ptr<char, Free> buffer_;
  Making making_;  // the calling thread's
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ready_[kSlots] = {};  // read, not yet hashed
  size_t to_read_ = 0, hashed_ = 0, written_ = 0;  // chunks
  int64_t moved_ = 0;                              // bytes written
  std::exception_ptr error_;
};

void copy_part(const Part& part, const File& out, int64_t position) {
#ifdef __linux__
  for (int64_t done = 0; done < part.length;) {
    loff_t from = part.offset + done, to = position + done;
    const ssize_t n =
        ::copy_file_range(part.source->fd(), &from, out.fd(), &to, static_cast<size_t>(part.length - done), 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(out.path());
    if (n == 0) part.source->ends_at(part.offset + done);
    done += n;
  }
#else
  (void)part, (void)position;
  errno = ENOTSUP;
  fail(out.path());
#endif
}

}  // namespace

void copy_through_ring(const Chunks& work, const File& out, Digests& digests,
                       const std::function<void(int64_t)>& moved) {
  if (!work.chunks.empty()) Ring(work, out).run(digests, moved);
}

void copy_in_kernel(const Chunks& work, const File& out, Digests& digests,
                    const std::function<void(int64_t)>& moved) {
  WriteBehind behind(out);
  Making making;
  Gatherer gatherer;
  std::vector<char> gathered;
  int64_t bytes = 0;
  for (const Chunk& chunk : work.chunks) {
    int64_t position = chunk.position;
    for (size_t i = chunk.first; i < chunk.last; ++i) {
      const Part& part = work.parts[i];
      if (part.gathered) {
        gathered.resize(static_cast<size_t>(part.length));
        gatherer.read(part, gathered.data());
        digests.feed(position, gathered.data(), part.length);
        out.write(gathered.data(), part.length, position);
        done_with(part);
      } else if (part.source) {
        copy_part(part, out, position);
        done_with(part);
      } else {
        const char* const bytes = part.made ? making.at(part) : part.literal;
        digests.feed(position, bytes, part.length);
        out.write(bytes, part.length, position);
        if (part.made) making.done(part);
      }
      position += part.length;
    }
    behind.wrote(chunk.position, chunk.length);
    moved(bytes += chunk.length);
  }
}

}  // namespace moekern::io
