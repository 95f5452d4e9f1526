#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace kvkeep::attention {
namespace {

constexpr int64_t kAppendAlone =
    16384;  // elements: fewer are written by the caller, waking the pool costs more

constexpr int64_t kMostKept = 16 << 20;  // floats: keys are read again where it would take more

// Note where each observed row's notes are to be kept; return how many floats they may take.
int64_t keep_at(const PreparedPlan& prepared, const Job& job, std::vector<int64_t>& kept) {
  kept.assign(prepared.num_rows, -1);
  int64_t floats = 0;
  for (int64_t row = 0; row < prepared.num_rows; row++) {
    if (!std::isfinite(job.thresholds[row * prepared.kv_heads * prepared.group])) continue;
    kept[row] = floats;
    const int64_t each = (job.plan.positions[row] / kStep + 1) * int64_t{kNoted};
    floats += each * prepared.group * prepared.kv_heads;
  }
  return floats;
}

// The share of an item's tiles that its KV head still has in this layer.
double kept_share(const Job& job, const Item& item) {
  int64_t live = 0, tiles = 0;
  for (int r = item.run_begin; r < item.run_end; r++) {
    const Run& run = job.plan.runs[r];
    const int from = std::max(0, (item.begin - run.first_position) / kPage);
    const int to = std::min(run.page_count, (item.end - run.first_position + kPage - 1) / kPage);
    for (int i = from; i < to; i++)
      live += job.plan.masks[job.cache.tile_of(run.page_begin + i, item.head)] != 0;
    tiles += std::max(0, to - from);
  }
  return tiles ? static_cast<double>(live) / tiles : 0.0;
}

// Work in the order in which it is best taken: as it is, but longest first in this layer where
// heads keep different numbers of tiles.
std::vector<int> order_of(const Job& job, const std::vector<PreparedPlan::Work>& work) {
  std::vector<int> order(work.size());
  std::iota(order.begin(), order.end(), 0);
  if (!job.plan.masks) return order;
  std::vector<double> cost;
  for (const auto& one : work) cost.push_back(one.cost * kept_share(job, one.item));
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return cost[a] > cost[b]; });
  return order;
}

// Call fn(record, state) for each state of rows at places [begin, end): where its m, l and O lie
// in the records, and in [2, T, Hq, D + 2].
template <class Fn>
void each_state(const PreparedPlan& prepared, const Job& job, int begin, int end, Fn&& fn) {
  const int dim = prepared.dim, heads = prepared.kv_heads * prepared.group;
  const int64_t line = line_floats(job.record_rows);
  for (int i = 0; i < 2; i++) {
    for (int place = begin; place < end; place++) {
      const int64_t row = job.plan.order ? job.plan.order[place] : place;
      for (int head = 0; head < heads; head++) {
        float* all = job.records +
                     (2 * int64_t{head / prepared.group} + i) * state_floats(job.record_rows, dim);
        const int64_t r = int64_t{place} * prepared.group + head % prepared.group;
        const int64_t at = ((i * prepared.num_rows + row) * heads + head) * (dim + 2);
        fn(all + r, all + line + r, all + 2 * line + r * dim, at, i);
      }
    }
  }
}

// Put states of elsewhere where the groups that go on from them look.
void take_in(const PreparedPlan& prepared, const Job& job, const float* carried) {
  for (const auto& [begin, end] : prepared.carried) {
    each_state(prepared, job, begin, end, [&](float* m, float* l, float* o, int64_t at, int) {
      *m = carried[at];
      *l = carried[at + 1];
      std::memcpy(o, carried + at + 2, sizeof(float) * prepared.dim);
    });
  }
}

void hand_out(const PreparedPlan& prepared, const Job& job, float* left) {
  const int rows = static_cast<int>(prepared.num_rows);
  each_state(prepared, job, 0, rows, [&](float* m, float* l, float* o, int64_t at, int i) {
    const bool empty = *m == -INFINITY || (i == 1 && prepared.whole_spans);
    left[at] = empty ? -INFINITY : *m;
    left[at + 1] = empty ? 0.0f : *l;
    for (int d = 0; d < prepared.dim; d++) left[at + 2 + d] = empty ? 0.0f : o[d];
  });
}

// Write the rows of one KV head whose index lies in [begin, end).
template <class T, int kPair>
void write_rows(const Cache& cache, const NewRows& rows, int head, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const int32_t slot = rows.slots[i];
    if (slot < 0) continue;
    const int32_t id = cache.table[cache.tile_of(slot / kPage, head)];
    T* k = reinterpret_cast<T*>(cache.base + id * cache.unit_bytes);
    T* v = k + int64_t{kPage} * cache.dim;
    const int row = slot % kPage;
    const T* from_k = static_cast<const T*>(rows.k) + i * rows.k_token + head * rows.k_head;
    const T* from_v = static_cast<const T*>(rows.v) + i * rows.v_token + head * rows.v_head;
    T* to_k = k + (row / 16) * 16 * cache.dim + row % 16 * kPair;
    T* to_v = v + int64_t{row / kPair} * cache.dim * kPair + row % kPair;
    for (int d = 0; d < cache.dim; d += kPair) {
      for (int p = 0; p < kPair; p++) to_k[d * 16 + p] = from_k[d + p];
    }
    for (int d = 0; d < cache.dim; d++) to_v[d * kPair] = from_v[d];
  }
}

// The slots' tiles exist in the pool, so that the writers need not look.
void check_slots(Layout layout, const Cache& cache, const NewRows& rows) {
  int64_t last = -1;
  for (int64_t i = 0; i < rows.count; i++) {
    const int64_t page = rows.slots[i] < 0 ? -1 : rows.slots[i] / kPage;
    if (page < 0 || page == last) continue;
    if (page >= cache.page_slots)
      throw std::invalid_argument("slots name a page outside the tile table");
    for (int head = 0; head < cache.kv_heads; head++) {
      const int32_t id = cache.table[cache.tile_of(page, head)];
      if (!cache.tile(id, tile_bytes(layout, cache.dim)))
        throw std::invalid_argument("slots name a page without a tile in the pool");
    }
    last = page;
  }
}

}  // namespace

const Kernels& Attention::kernels(Layout layout) const {
  const int index = static_cast<int>(layout);
#if defined(__x86_64__)
  if (backend_.isa == Isa::kAvx512) return avx512::kKernels[index];
  if (backend_.isa == Isa::kAvx2) return avx2::kKernels[index];
#endif
  return portable::kKernels[index];
}

void Attention::append(Layout layout, const Cache& cache, const NewRows& rows) {
  auto held = backend_.enter();
  check_slots(layout, cache, rows);
  const int64_t blocks = (rows.count + kPage - 1) / kPage;
  const auto write = [&](int64_t job) {
    const int head = static_cast<int>(job / blocks);
    const int64_t begin = job % blocks * kPage, end = std::min(begin + kPage, rows.count);
    if (layout == Layout::kBf16) {
      write_rows<uint16_t, 2>(cache, rows, head, begin, end);
    } else {
      write_rows<float, 1>(cache, rows, head, begin, end);
    }
  };
  if (rows.count * cache.kv_heads * cache.dim < kAppendAlone) {
    for (int64_t job = 0; job < blocks * cache.kv_heads; job++) write(job);
  } else {
    backend_.pool.parallel_for(blocks * cache.kv_heads, write);
  }
}

void Attention::attend(const PreparedPlan& prepared, Job job, const float* carried, float* left) {
  auto held = backend_.enter();
  if (prepared.carried.empty() != !carried || prepared.leaves != (left != nullptr))
    throw std::invalid_argument("a plan's states of elsewhere and what is passed differ");
  calls_.fetch_add(1, std::memory_order_relaxed);
  if (prepared.by_head && !job.cache.coded)
    throw std::invalid_argument("a run's layout is by head and the layer names none");
  int bad_tile = 0;
  job.bad_tile = &bad_tile;
  job.plan = prepared.plan;
  job.coded = prepared.coded;
  job.decoded = widen_ == Widen::kNo ? nullptr : &decoded_;
  job.halves = widen_ == Widen::kHalves;
  const Kernels& kernel = kernels(prepared.layout);
  const int64_t wanted = kernel.scratch_bytes(prepared.dim, prepared.most_rows) +
                         kernel.scratch_bytes(prepared.dim, kPanel);
  const int64_t each = (wanted + 4095) / 4096 * 4096;
  char* scratch = scratch_.reserve<char>(each * backend_.pool.threads());
  job.states = states_.reserve<float>(prepared.state_floats);
  job.records = records_.reserve<float>(prepared.record_floats);
  job.record_rows = static_cast<int>(prepared.num_rows * prepared.group);
  if (carried) take_in(prepared, job, carried);
  const auto run = [&](const std::vector<PreparedPlan::Work>& work, auto kernel_of_work) {
    const std::vector<int> order = order_of(job, work);
    backend_.pool.parallel_for(static_cast<int64_t>(work.size()), [&](int64_t i, int thread) {
      kernel_of_work(work[order[i]], scratch + each * thread);
    });
  };
  std::vector<int64_t> kept;
  const int64_t floats = job.thresholds && !job.decoded ? keep_at(prepared, job, kept) : 0;
  job.kept = kept.data();
  job.scores = floats && floats <= kMostKept ? scores_.reserve<float>(floats + kPage) : nullptr;
  const auto count = [&](uint64_t bytes) {
    bytes_read_.fetch_add(bytes, std::memory_order_relaxed);
  };
  for (const auto& wave : prepared.waves) {
    run(wave.work, [&](const PreparedPlan::Work& work, char* memory) {
      const Beside beside{wave.beside.data() + work.beside_begin,
                          work.beside_end - work.beside_begin};
      count(kernel.attend(job, work.item, beside, memory));
    });
    run(wave.folds,
        [&](const PreparedPlan::Work& work, char* memory) { kernel.fold(job, work.item, memory); });
  }
  for (const auto& wave : prepared.waves) {
    if (!job.thresholds) break;
    run(wave.work, [&](const PreparedPlan::Work& work, char* memory) {
      count(kernel.observe(job, work.item, memory));
      for (int i = work.beside_begin; i < work.beside_end; i++)
        count(kernel.observe(job, wave.beside[i], memory));
    });
  }
  if (left) hand_out(prepared, job, left);
  if (bad_tile) throw std::invalid_argument("the plan names a page without a tile in the pool");
}

int64_t Attention::spin(Layout layout, int64_t rounds) {
  auto held = backend_.enter();
  std::atomic<int64_t> flops{0};
  backend_.pool.parallel_shares(backend_.pool.threads(), [&](int64_t) {
    float sink;
    flops.fetch_add(kernels(layout).spin(rounds, &sink), std::memory_order_relaxed);
  });
  return flops.load();
}

void Attention::merge(Layout layout, const void* outs, const float* lse2s, int64_t parts,
                      int64_t rows, int dim, void* out, float* lse2) {
  auto held = backend_.enter();
  const Kernels& kernel = kernels(layout);
  const int64_t each = 2 * dim;
  float* scratch = scratch_.reserve<float>(each * backend_.pool.threads());
  backend_.pool.parallel_for(rows, [&](int64_t row, int thread) {
    kernel.merge(outs, lse2s, parts, rows, row, dim, out, lse2, scratch + each * thread);
  });
}

}  // namespace kvkeep::attention
