// Paged attention over tiles: a plan's groups are cut into items of rows x KV heads x tokens and
// handed to the pool in waves, parents before their children, longest first. How it is cut never
// shows in a bit of the result; see the order of sums in kvkeep/ops/layout.py.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "attention_job.hpp"
#include "backend.hpp"
#include "buffer.hpp"

namespace kvkeep::attention {

// kvkeep.ops.layout.AttentionPlan with its lengths; the arrays outlive the PreparedPlan made of it.
struct PlanArrays {
  Plan plan;
  const int32_t (*groups)[4];
  const int32_t* parents;  // or null: all are roots; kCarried: goes on from states of elsewhere
  int64_t num_rows, num_groups, num_runs, num_pages, num_private;
};

// A plan checked and cut into items, good for all layers of a step.
struct PreparedPlan {
  struct Work {
    Item item;
    int64_t cost;
    int beside_begin = 0, beside_end = 0;  // of the wave's `beside`
  };
  struct Wave {                // what may run at the same time
    std::vector<Work> work;    // longest first
    std::vector<Work> folds;   // items whose tokens were cut into pieces
    std::vector<Item> beside;  // pieces attended between the steps of `work`
  };

  Plan plan;
  Layout layout;
  int group, kv_heads, dim;
  int64_t num_rows, num_pages;
  bool coded;    // some run's tiles are codes
  bool by_head;  // some run's layout is a layer's own
  std::vector<Wave> waves;
  int64_t state_floats = 0;   // for pieces
  int64_t record_floats = 0;  // between parents and children
  int most_rows = 0;          // of an item
  double makespan = 0;        // predicted, over the larger of an even share and the longest item
  std::vector<std::pair<int, int>> carried;  // places of groups that go on from states of elsewhere
  bool leaves = false;                       // rows' states instead of their results
  bool whole_spans = false;                  // of such a part: nothing of a span is left over

  int64_t pieces_beside() const {
    int64_t count = 0;
    for (const auto& wave : waves) count += static_cast<int64_t>(wave.beside.size());
    return count;
  }
};

// Throws std::invalid_argument where the plan contradicts itself. `leaves`: states are asked for.
PreparedPlan prepare(const PlanArrays& arrays, Layout layout, int group, int kv_heads, int dim,
                     int threads, bool leaves);

// k and v [T, Hkv, D] by strides in elements; slots [T] = page slot * 64 + row, -1 skips.
struct NewRows {
  const void *k, *v;
  int64_t k_token, k_head, v_token, v_head;
  const int32_t* slots;
  int64_t count;
};

class Attention {
 public:
  Attention(Backend& backend, Widen widen) : backend_(backend), widen_(widen) {}

  void append(Layout layout, const Cache& cache, const NewRows& rows);
  // `carried` and `left` are [2, T, Hq, D + 2] (m, l, O of complete spans, then of the last one's
  // part), for plans that go on from states and such that leave them; or null.
  void attend(const PreparedPlan& prepared, Job job, const float* carried, float* left);
  void merge(Layout layout, const void* outs, const float* lse2s, int64_t parts, int64_t rows,
             int dim, void* out, float* lse2);

  int64_t spin(Layout layout, int64_t rounds);  // on every thread; returns the flops of all

  Backend& backend() const { return backend_; }
  uint64_t bytes_read() const { return bytes_read_.load(std::memory_order_relaxed); }
  uint64_t decoded() const {
    return decoded_;
  }  // tiles widened, for each block of rows if to floats
  uint64_t calls() const { return calls_.load(std::memory_order_relaxed); }

 private:
  const Kernels& kernels(Layout layout) const;

  Backend& backend_;
  const Widen widen_;
  uint64_t decoded_ = 0;
  Buffer scratch_, states_, records_, scores_;
  std::atomic<uint64_t> bytes_read_{0};  // of K and V, by attend
  std::atomic<uint64_t> calls_{0};       // of attend
};

}  // namespace kvkeep::attention
