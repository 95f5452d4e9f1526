#include "attention.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace kvkeep::attention {
namespace {

constexpr int64_t kAppendAlone =
    16384;  // elements: fewer are written by the caller, waking the pool costs more

// Write the rows of one KV head whose index lies in [begin, end).
template <class T, int kPair>
void write_rows(const Cache& cache, const NewRows& rows, int head, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const int32_t slot = rows.slots[i];
    if (slot < 0) continue;
    const int32_t id = cache.table[cache.tile_of(slot / kPage, head)];
    T* k = reinterpret_cast<T*>(cache.base + id * cache.tile_bytes);
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
void check_slots(const Cache& cache, const NewRows& rows) {
  int64_t last = -1;
  for (int64_t i = 0; i < rows.count; i++) {
    const int64_t page = rows.slots[i] < 0 ? -1 : rows.slots[i] / kPage;
    if (page < 0 || page == last) continue;
    if (page >= cache.page_slots)
      throw std::invalid_argument("slots name a page outside the tile table");
    for (int head = 0; head < cache.kv_heads; head++) {
      const int32_t id = cache.table[cache.tile_of(page, head)];
      if (id < 0 || id >= cache.num_tiles)
        throw std::invalid_argument("slots name a page without a tile in the pool");
    }
    last = page;
  }
}

void check(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

void check_plan(const PlanArrays& arrays, Layout layout) {
  for (int64_t i = 0; i < arrays.num_runs; i++) {
    const Run& run = arrays.plan.runs[i];
    check(run.layout == static_cast<int32_t>(layout),
          "a run's layout is not that of the queries' dtype");
    check(run.page_begin >= 0 && run.page_count >= 0 &&
              run.page_begin + int64_t{run.page_count} <= arrays.num_pages,
          "a run reaches outside the plan's pages");
    check(run.first_position >= 0 && run.first_position % kStep == 0,
          "a run starts inside a step of 128 tokens");
  }
  int64_t rows = 0;
  for (int64_t i = 0; i < arrays.num_groups; i++) {
    const auto& [row_begin, row_end, run_begin, run_end] = arrays.groups[i];
    rows += row_end - row_begin;
    check(row_begin >= 0 && row_begin <= row_end && row_end <= arrays.num_rows,
          "a group reaches outside the rows");
    check(run_begin >= 0 && run_begin <= run_end && run_end <= arrays.num_runs,
          "a group reaches outside the runs");
    for (int32_t r = run_begin; r + 1 < run_end; r++) {
      const Run& run = arrays.plan.runs[r];
      check(arrays.plan.runs[r + 1].first_position >= run.first_position + run.page_count * kPage,
            "a group's runs are not in order of position");
    }
  }
  check(rows == arrays.num_rows, "the groups do not hold every row once");
}

// Arithmetic and memory of a panel over spans [begin, end), in units of one row and token.
int64_t cost_of(int rows, int32_t first, int32_t last, int32_t begin, int32_t end) {
  constexpr int kTokenCost = 9;  // reading a token costs as much as nine rows' arithmetic on it
  const int64_t middle = (int64_t{first} + last) / 2 + 1;
  const int64_t tokens = std::clamp<int64_t>(middle, int64_t{begin} * kSpan, int64_t{end} * kSpan) -
                         int64_t{begin} * kSpan;
  return (tokens + kPage) * (rows + kTokenCost);
}

struct PanelRange {
  Item item;
  int32_t first, last;  // positions
};

std::vector<PanelRange> cut_panels(const PlanArrays& arrays, int group, int kv_heads) {
  std::vector<PanelRange> panels;
  for (int64_t g = 0; g < arrays.num_groups; g++) {
    const auto& [row_begin, row_end, run_begin, run_end] = arrays.groups[g];
    const int rows = (row_end - row_begin) * group;
    for (int begin = 0; begin < rows; begin += kPanel) {
      const int end = std::min(begin + kPanel, rows);
      const auto* at = arrays.plan.positions + row_begin;
      const auto [first, last] =
          std::minmax_element(at + begin / group, at + (end - 1) / group + 1);
      int32_t seen = *last + 1;
      if (run_end > run_begin) {
        const Run& run = arrays.plan.runs[run_end - 1];
        seen = std::min(seen, run.first_position + run.page_count * kPage);
      } else {
        seen = 0;
      }
      const int32_t spans = (std::max(seen, 0) + kSpan - 1) / kSpan;
      for (int head = 0; head < kv_heads; head++) {
        panels.push_back(
            {{row_begin, head, begin, end, run_begin, run_end, 0, spans, nullptr}, *first, *last});
      }
    }
  }
  return panels;
}

// How much longer than an even share the slowest thread works if panels are not split.
bool even_enough(const std::vector<PreparedPlan::Work>& work, int threads) {
  std::vector<int64_t> load(threads, 0);
  int64_t total = 0;
  for (const auto& w : work) {
    *std::min_element(load.begin(), load.end()) += w.cost;
    total += w.cost;
  }
  return *std::max_element(load.begin(), load.end()) <= total / threads + total / (12 * threads);
}

void split(PreparedPlan& prepared, const PreparedPlan::Work& whole, const PanelRange& panel,
           int64_t most) {
  const int rows = panel.item.row_end - panel.item.row_begin;
  const int32_t spans = panel.item.span_end;
  const int32_t parts =
      static_cast<int32_t>(std::min<int64_t>(spans, (whole.cost + most - 1) / most));
  PreparedPlan::Work joined = whole;
  joined.offset = prepared.state_floats;
  for (int32_t part = 0; part < parts; part++) {
    PreparedPlan::Work piece = joined;
    piece.item.span_begin = spans * part / parts;
    piece.item.span_end = spans * (part + 1) / parts;
    piece.offset += piece.item.span_begin * state_floats(rows, prepared.dim);
    piece.cost = cost_of(rows, panel.first, panel.last, piece.item.span_begin, piece.item.span_end);
    prepared.work.push_back(piece);
  }
  prepared.state_floats += spans * state_floats(rows, prepared.dim);
  prepared.folds.push_back(joined);
}

}  // namespace

PreparedPlan prepare(const PlanArrays& arrays, Layout layout, int group, int kv_heads, int dim,
                     int threads) {
  check_plan(arrays, layout);
  PreparedPlan prepared{arrays.plan,     layout,           group, kv_heads, dim,
                        arrays.num_rows, arrays.num_pages, {},    {}};
  const auto panels = cut_panels(arrays, group, kv_heads);
  const auto longest = [](const auto& a, const auto& b) { return a.cost > b.cost; };
  int64_t total = 0;
  for (const auto& panel : panels) {
    const Item& item = panel.item;
    const int64_t cost =
        cost_of(item.row_end - item.row_begin, panel.first, panel.last, 0, item.span_end);
    prepared.work.push_back({item, -1, cost});
    total += cost;
  }
  auto whole = prepared.work;
  std::stable_sort(prepared.work.begin(), prepared.work.end(), longest);
  if (threads == 1 || even_enough(prepared.work, threads)) return prepared;
  prepared.work.clear();
  const int64_t most = std::max<int64_t>(total / (4 * threads), 1);
  for (size_t i = 0; i < whole.size(); i++) {
    if (whole[i].cost > most && whole[i].item.span_end > 1) {
      split(prepared, whole[i], panels[i], most);
    } else {
      prepared.work.push_back(whole[i]);
    }
  }
  std::stable_sort(prepared.work.begin(), prepared.work.end(), longest);
  return prepared;
}

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
  check_slots(cache, rows);
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

void Attention::attend(const PreparedPlan& prepared, Job job) {
  auto held = backend_.enter();
  calls_.fetch_add(1, std::memory_order_relaxed);
  int bad_tile = 0;
  job.bad_tile = &bad_tile;
  job.plan = prepared.plan;
  const Kernels& kernel = kernels(prepared.layout);
  const int64_t each = (kernel.scratch_bytes(prepared.dim) + 4095) / 4096 * 4096;
  char* scratch = scratch_.reserve<char>(each * backend_.pool.threads());
  float* states = states_.reserve<float>(prepared.state_floats);
  const auto run = [&](const std::vector<PreparedPlan::Work>& work, auto kernel_of_item) {
    backend_.pool.parallel_for(static_cast<int64_t>(work.size()), [&](int64_t i, int thread) {
      Item item = work[i].item;
      item.states = work[i].offset < 0 ? nullptr : states + work[i].offset;
      kernel_of_item(job, item, scratch + each * thread);
    });
  };
  const auto count = [&](uint64_t bytes) {
    bytes_read_.fetch_add(bytes, std::memory_order_relaxed);
  };
  run(prepared.work,
      [&](const Job& j, const Item& item, char* memory) { count(kernel.attend(j, item, memory)); });
  run(prepared.folds, kernel.fold);
  if (job.thresholds) {
    run(prepared.work, [&](const Job& j, const Item& item, char* memory) {
      count(kernel.observe(j, item, memory));
    });
  }
  if (bad_tile) throw std::invalid_argument("the plan names a page without a tile in the pool");
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
