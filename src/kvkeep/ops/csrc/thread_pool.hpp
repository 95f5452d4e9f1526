// A small pool: the caller and up to N-1 workers run the jobs of one region together.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace kvkeep {

// One region at a time: concurrent callers take turns by a lock of their own (see Backend::enter).
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Run fn(job) or fn(job, thread) for job 0..jobs-1, handed out one by one in rising order.
  template <class Fn>
  void parallel_for(int64_t jobs, Fn&& fn) {
    run(jobs, false, fn);
  }

  // The same, but each thread walks a contiguous share of the jobs from its front; one that is done
  // takes over jobs from the back of another's share. For jobs that stream neighbouring memory.
  template <class Fn>
  void parallel_shares(int64_t jobs, Fn&& fn) {
    run(jobs, true, fn);
  }

 private:
  using Job = void (*)(void* context, int64_t job, int thread);

  // begin and end of what is left of a thread's share, in one word so that owner and thieves agree.
  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};
  };

  template <class Fn>
  static void call(void* context, int64_t job, int thread) {
    auto& fn = *static_cast<std::remove_reference_t<Fn>*>(context);
    if constexpr (std::is_invocable_v<decltype(fn), int64_t, int>) {
      fn(job, thread);
    } else {
      fn(job);
    }
  }

  template <class Fn>
  void run(int64_t jobs, bool shares, Fn& fn) {
    start(jobs, shares, &call<Fn>, const_cast<void*>(static_cast<const void*>(&fn)));
  }

  void start(int64_t jobs, bool shares, Job job, void* context);
  void work(int thread);
  void work_shares(int thread);
  void loop(int thread);
  bool join_region(uint32_t& seen);

  const int threads_;
  std::unique_ptr<Share[]> shares_;
  std::vector<std::thread> workers_;

  std::mutex sleep_mutex_;
  std::condition_variable wake_;

  // The current region: its number in the upper half; whether it may be joined; how many workers
  // are inside. The caller closes it when no job is left, so a worker that wakes late is not waited
  // for.
  alignas(64) std::atomic<uint64_t> region_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<int64_t> next_{0};

  Job job_ = nullptr;
  void* context_ = nullptr;
  int64_t jobs_ = 0;
  bool use_shares_ = false;
};

}  // namespace kvkeep
