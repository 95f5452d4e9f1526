#include "thread_pool.hpp"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvkeep {
namespace {

constexpr auto kSpin =
    std::chrono::microseconds(50);  // covers the host work between two kernels of a step

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

constexpr int kPatience = 4096;  // rounds of waiting for the last job before giving the core away

constexpr uint64_t kOpen = uint64_t{1} << 31;
uint32_t number_of(uint64_t region) { return static_cast<uint32_t>(region >> 32); }
uint64_t inside(uint64_t region) { return region & (kOpen - 1); }

uint64_t pack(uint64_t begin, uint64_t end) { return begin << 32 | end; }
uint64_t begin_of(uint64_t range) { return range >> 32; }
uint64_t end_of(uint64_t range) { return range & 0xffffffffu; }

}  // namespace

ThreadPool::ThreadPool(int threads)
    : threads_(threads < 1 ? 1 : threads), shares_(new Share[threads < 1 ? 1 : threads]) {
  for (int i = 1; i < threads_; i++) workers_.emplace_back([this, i] { loop(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(sleep_mutex_);
    stop_.store(true);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::start(int64_t jobs, bool shares, Job job, void* context) {
  if (jobs <= 0) return;
  if (jobs == 1 || threads_ == 1) {
    for (int64_t i = 0; i < jobs; i++) job(context, i, 0);
    return;
  }
  job_ = job;
  context_ = context;
  jobs_ = jobs;
  use_shares_ = shares;
  next_.store(0, std::memory_order_relaxed);
  for (int i = 0; i < threads_; i++) {
    shares_[i].range.store(pack(jobs * i / threads_, jobs * (i + 1) / threads_),
                           std::memory_order_relaxed);
  }
  const uint64_t number = number_of(region_.load(std::memory_order_relaxed)) + uint64_t{1};
  region_.store(number << 32 | kOpen);
  if (sleepers_.load() > 0) {
    {
      std::lock_guard lock(sleep_mutex_);
    }
    wake_.notify_all();
  }
  work(0);
  region_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int i = 0; inside(region_.load(std::memory_order_acquire)) != 0; i++) {
    if (i < kPatience) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::work(int thread) {
  if (use_shares_) {
    work_shares(thread);
    return;
  }
  for (;;) {
    int64_t job = next_.fetch_add(1, std::memory_order_relaxed);
    if (job >= jobs_) return;
    job_(context_, job, thread);
  }
}

void ThreadPool::work_shares(int thread) {
  for (int step = 0; step < threads_; step++) {
    auto& range = shares_[(thread + step) % threads_].range;
    uint64_t seen = range.load(std::memory_order_relaxed);
    while (begin_of(seen) < end_of(seen)) {
      bool own = step == 0;
      uint64_t rest =
          own ? pack(begin_of(seen) + 1, end_of(seen)) : pack(begin_of(seen), end_of(seen) - 1);
      if (!range.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) continue;
      job_(context_, static_cast<int64_t>(own ? begin_of(seen) : end_of(rest)), thread);
      seen = range.load(std::memory_order_relaxed);
    }
  }
}

void ThreadPool::loop(int thread) {
  uint32_t seen = 0;
  while (join_region(seen)) {
    work(thread);
    region_.fetch_sub(1, std::memory_order_release);
  }
}

// Wait for a region after `seen` and enter it; return false once the pool stops.
bool ThreadPool::join_region(uint32_t& seen) {
  auto until = std::chrono::steady_clock::now() + kSpin;
  for (int i = 0; !stop_.load(std::memory_order_relaxed); i++) {
    uint64_t region = region_.load(std::memory_order_acquire);
    if (number_of(region) != seen) {
      if (!(region & kOpen)) {
        seen = number_of(region);
      } else if (region_.compare_exchange_weak(region, region + 1, std::memory_order_acq_rel)) {
        seen = number_of(region);
        return true;
      }
      continue;
    }
    relax();
    if (i % 64 != 63 || std::chrono::steady_clock::now() < until) continue;
    std::unique_lock lock(sleep_mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return number_of(region_.load()) != seen || stop_.load(); });
    sleepers_.fetch_sub(1);
  }
  return false;
}

}  // namespace kvkeep
