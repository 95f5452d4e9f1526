// What one `ops.select` owns: an instruction set, its threads, and a count of the kernel calls
// made.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "buffer.hpp"
#include "cpu_features.hpp"
#include "thread_pool.hpp"

namespace kvkeep {

// Memory of the leaf and sampling kernels, grown on demand and kept.
struct Scratch {
  Buffer staged;      // activations in the units a kernel reads
  Buffer per_thread;  // spilled accumulators and decoded weights
  Buffer gate_up;
  Buffer hidden;
  Buffer block_sums;  // of the rows a draw is made from
};

struct Backend {
  Backend(Isa isa, int threads) : isa(isa), pool(threads) {}

  // Count a kernel call and hold the backend until it ends: its pool and scratch memory serve one
  // call at a time.
  [[nodiscard]] std::unique_lock<std::mutex> enter() {
    calls.fetch_add(1, std::memory_order_relaxed);
    return std::unique_lock(mutex);
  }

  const Isa isa;
  ThreadPool pool;
  Scratch scratch;
  std::mutex mutex;
  std::atomic<uint64_t> calls{0};
};

}  // namespace kvkeep
