#include <algorithm>
#include <functional>
#include <stdexcept>

#include "attention.hpp"

namespace kvkeep::attention {
namespace {

void check(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// Every row in one leaf, every group's runs in order.
void check_groups(const PlanArrays& arrays) {
  std::vector<bool> placed(arrays.num_rows, false);
  for (int64_t place = 0; arrays.plan.order && place < arrays.num_rows; place++) {
    const int32_t row = arrays.plan.order[place];
    check(row >= 0 && row < arrays.num_rows && !placed[row], "the order is not one of the rows");
    placed[row] = true;
  }
  std::vector<bool> inner(arrays.num_groups, false);
  for (int64_t g = 0; arrays.parents && g < arrays.num_groups; g++) {
    check(arrays.parents[g] < g, "a group comes before its parent");
    if (arrays.parents[g] >= 0) inner[arrays.parents[g]] = true;
  }
  int64_t rows = 0;
  for (int64_t i = 0; i < arrays.num_groups; i++) {
    const auto& [row_begin, row_end, run_begin, run_end] = arrays.groups[i];
    rows += inner[i] ? 0 : row_end - row_begin;
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

void check_plan(const PlanArrays& arrays, Layout layout) {
  for (int64_t i = 0; i < arrays.num_runs; i++) {
    const Run& run = arrays.plan.runs[i];
    const auto stored = static_cast<Layout>(run.layout);
    check(stored == layout || (is_coded(stored) && stored <= Layout::kByHead),
          "a run's layout is neither coded nor that of the queries' dtype");
    check(run.page_begin >= 0 && run.page_count >= 0 &&
              run.page_begin + int64_t{run.page_count} <= arrays.num_pages,
          "a run reaches outside the plan's pages");
    check(run.first_position >= 0 && run.first_position % kStep == 0,
          "a run starts inside a step of 128 tokens");
  }
  check_groups(arrays);
}

template <class Fn>
bool any_run(const PlanArrays& arrays, Fn&& is) {
  return std::any_of(arrays.plan.runs, arrays.plan.runs + arrays.num_runs,
                     [&](const Run& run) { return is(static_cast<Layout>(run.layout)); });
}

// A group's tokens, its distance from its root, and how many of its rows its children hold.
struct Node {
  int32_t begin = 0, end = 0;
  int depth = 0;
  int32_t held = 0;
  bool leaf() const { return held == 0; }
};

std::vector<Node> nodes_of(const PlanArrays& arrays) {
  std::vector<Node> nodes(arrays.num_groups);
  for (int64_t g = 0; g < arrays.num_groups; g++) {
    const auto& [row_begin, row_end, run_begin, run_end] = arrays.groups[g];
    Node& node = nodes[g];
    const int32_t parent = arrays.parents ? arrays.parents[g] : -1;
    if (parent >= 0) {
      check(parent < g, "a group comes before its parent");
      const auto& [begin, end, runs_begin, runs_end] = arrays.groups[parent];
      check(row_begin == begin + nodes[parent].held && row_begin < row_end && row_end <= end,
            "a group's children do not divide its rows");
      nodes[parent].held += row_end - row_begin;
      node.depth = nodes[parent].depth + 1;
      node.begin = nodes[parent].end;
    }
    check(parent != kCarried || run_begin < run_end, "a group goes on from elsewhere to nothing");
    if (parent == kCarried) node.begin = arrays.plan.runs[run_begin].first_position;
    node.end = node.begin;
    if (run_begin == run_end) continue;
    const Run& last = arrays.plan.runs[run_end - 1];
    node.end = last.first_position + last.page_count * kPage;
    check(arrays.plan.runs[run_begin].first_position >= node.begin,
          "a group's tokens overlap its parent's");
  }
  return nodes;
}

// What a token costs, and a row's arithmetic on it, in tenths of a row's on a token of floats.
// Measured at head_dim 64 and 128 on AVX-512, tokens from memory: codes are cheap to read.
struct Weight {
  int token, row;
  int64_t of(int rows) const { return token + int64_t{row} * rows; }
};

Weight weight_of(Layout layout) {
  switch (layout) {
    case Layout::kK2V2:
      return {21, 8};
    case Layout::kK4V2:
    case Layout::kByHead:  // two or four bits: which, differs by layer
      return {27, 8};
    case Layout::kK4V4:
      return {33, 8};
    case Layout::kK8V8:
      return {70, 11};
    default:
      return {90, 10};
  }
}

// Arithmetic and memory of `rows` rows over tokens [begin, end) of runs, which go by position.
int64_t cost_of(const Plan& plan, int run_begin, int run_end, int rows, int64_t begin,
                int64_t end) {
  int64_t cost = 0;
  for (int r = run_begin; r < run_end; r++) {
    const Run& run = plan.runs[r];
    const int64_t from = std::max<int64_t>(run.first_position, begin);
    const int64_t to = std::min<int64_t>(run.first_position + int64_t{run.page_count} * kPage, end);
    if (from < to) cost += (to - from) * weight_of(static_cast<Layout>(run.layout)).of(rows);
  }
  return cost;
}

int64_t cost_of(const Plan& plan, const Item& item) {
  return cost_of(plan, item.run_begin, item.run_end, item.row_end - item.row_begin, item.begin,
                 item.end);
}

// Cut a group into items of at most `most` rows, one for each KV head.
void cut_rows(PreparedPlan& prepared, const PlanArrays& arrays, int64_t g, const Node& node,
              std::vector<PreparedPlan::Work>& to) {
  const auto& [row_begin, row_end, run_begin, run_end] = arrays.groups[g];
  const int rows = (row_end - row_begin) * prepared.group;
  const int most = node.leaf() ? kPanel : rows;  // a shared token is read once for all rows
  const bool root = !arrays.parents || (arrays.parents[g] < 0 && arrays.parents[g] != kCarried);
  const bool leaf = node.leaf() && !prepared.leaves;
  for (int begin = 0; begin < rows; begin += most) {
    const int end = std::min(begin + most, rows);
    int32_t first = INT32_MAX, last = -1;
    for (int place = row_begin + begin / prepared.group;
         place <= row_begin + (end - 1) / prepared.group; place++) {
      const int32_t at =
          arrays.plan.positions[arrays.plan.order ? arrays.plan.order[place] : place];
      first = std::min(first, at);
      last = std::max(last, at);
    }
    check(leaf || first >= node.end - 1, "a row does not see all of a shared group");
    const int32_t seen = std::max(std::min(last + 1, node.end), node.begin);
    const int64_t middle = (int64_t{first} + last) / 2 + 1;  // rows see less, the earlier they are
    const int64_t cost = kPage * weight_of(prepared.layout).of(end - begin) +
                         cost_of(arrays.plan, run_begin, run_end, end - begin, node.begin,
                                 std::clamp<int64_t>(middle, node.begin, seen));
    prepared.most_rows = std::max(prepared.most_rows, end - begin);
    for (int head = 0; head < prepared.kv_heads; head++) {
      to.push_back(
          {{row_begin, head, begin, end, run_begin, run_end, node.begin, seen, root, leaf, -1},
           cost});
    }
  }
}

int spans_of(const Item& item) {
  return item.end > item.begin ? (item.end - 1) / kSpan - item.begin / kSpan + 1 : 0;
}

// How many pieces of at most `most` cost an item is cut into, at ends of spans.
int parts_of(const PreparedPlan::Work& work, int64_t most) {
  const int64_t wanted = (work.cost + most - 1) / most;
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max(spans_of(work.item), 1)));
}

// The longest thread's load where items are cut into pieces of at most `most` cost and dealt
// longest first, to the least loaded.
int64_t makespan(const std::vector<PreparedPlan::Work>& work, int threads,
                 int64_t most = INT64_MAX / 2) {
  std::vector<int64_t> pieces;
  for (const auto& w : work) {
    const int parts = parts_of(w, most);
    pieces.insert(pieces.end(), parts, w.cost / parts);
  }
  std::stable_sort(pieces.begin(), pieces.end(), std::greater<>());
  std::vector<int64_t> load(threads, 0);
  for (const int64_t cost : pieces) *std::min_element(load.begin(), load.end()) += cost;
  return *std::max_element(load.begin(), load.end());
}

// The largest piece that keeps all threads busy: pieces cost states to be kept and folded.
int64_t target_cost(const std::vector<PreparedPlan::Work>& work, int threads, int64_t enough) {
  int64_t low = 0, high = 0;  // low: small enough, or as small as is tried
  for (const auto& w : work) {
    low += w.cost;
    high = std::max(high, w.cost);
  }
  low = std::max<int64_t>(low / (8 * threads), 1);
  for (int tries = 0; tries < 8 && low < high; tries++) {
    const int64_t middle = low + (high - low) / 2;
    (makespan(work, threads, middle) <= enough ? low : high) = middle;
  }
  return low;
}

// Cut an item at ends of spans into `parts` pieces, to be folded at the end of its wave.
void split(PreparedPlan& prepared, PreparedPlan::Wave& wave, PreparedPlan::Work whole, int parts,
           std::vector<PreparedPlan::Work>& pieces) {
  const Item item = whole.item;
  const int rows = item.row_end - item.row_begin, spans = spans_of(item);
  const int first = item.begin / kSpan;
  const double all = std::max<int64_t>(cost_of(prepared.plan, item), 1);
  whole.item.states = prepared.state_floats;
  for (int part = 0; part < parts; part++) {
    PreparedPlan::Work piece = whole;
    const int from = spans * part / parts, to = spans * (part + 1) / parts;
    piece.item.begin = std::max(item.begin, (first + from) * kSpan);
    piece.item.end = std::min(item.end, (first + to) * kSpan);
    piece.item.states += from * state_floats(rows, prepared.dim);
    piece.cost = static_cast<int64_t>(whole.cost * (cost_of(prepared.plan, piece.item) / all));
    pieces.push_back(piece);
  }
  prepared.state_floats += spans * state_floats(rows, prepared.dim);
  wave.folds.push_back(whole);
}

// Longest first, cut smaller where that leaves a thread idle.
void schedule(PreparedPlan& prepared, PreparedPlan::Wave& wave, int threads) {
  const auto longest = [](const auto& a, const auto& b) { return a.cost > b.cost; };
  std::stable_sort(wave.work.begin(), wave.work.end(), longest);
  int64_t total = 0;
  for (const auto& w : wave.work) total += w.cost;
  const int64_t enough = total / threads + total / (12 * threads);
  if (threads == 1 || makespan(wave.work, threads) <= enough) return;
  const int64_t most = target_cost(wave.work, threads, enough);
  std::vector<PreparedPlan::Work> whole;
  std::swap(whole, wave.work);
  for (const auto& w : whole) {
    const int parts = parts_of(w, most);
    if (parts > 1) {
      split(prepared, wave, w, parts, wave.work);
    } else {
      wave.work.push_back(w);
    }
  }
  std::stable_sort(wave.work.begin(), wave.work.end(), longest);
}

// Items of few rows are bound by memory, items of many by arithmetic: the former are attended
// between the steps of the latter, in an earlier wave or the same one.
constexpr int kFew = 16, kMany = 32;
constexpr int kFewTokens = 512;    // fewer are not worth keeping states for
constexpr int kRowsPerToken = 12;  // whose arithmetic hides the reading of a token
constexpr int kMostHidden = 6;  // tokens per token: fetched ahead, more would not stay in a cache

int rows_of(const Item& item) { return item.row_end - item.row_begin; }
int tokens_of(const Item& item) { return item.end - item.begin; }

// How many tokens could be read beside an item.
int64_t room_beside(const Item& item) {
  if (rows_of(item) < kMany) return 0;
  return int64_t{tokens_of(item)} * std::min(rows_of(item) / kRowsPerToken, kMostHidden);
}

// Take items out of the waves that fit beside others; return each wave's, cut into spans.
std::vector<std::vector<PreparedPlan::Work>> detach(PreparedPlan& prepared) {
  std::vector<std::vector<PreparedPlan::Work>> detached(prepared.waves.size());
  int64_t room = 0;
  for (size_t d = 0; d < prepared.waves.size(); d++) {
    auto& wave = prepared.waves[d];
    for (const auto& w : wave.work) room += room_beside(w.item);
    std::vector<PreparedPlan::Work> kept;
    for (const auto& w : wave.work) {
      const bool fits = w.item.leaf && rows_of(w.item) <= kFew && w.item.begin % kSpan == 0 &&
                        tokens_of(w.item) >= kFewTokens && tokens_of(w.item) <= room;
      if (fits) {
        room -= tokens_of(w.item);
        split(prepared, wave, w, spans_of(w.item), detached[d]);
      } else {
        kept.push_back(w);
      }
    }
    std::swap(wave.work, kept);
  }
  return detached;
}

// Deal the detached pieces to the items that have room, in proportion to it.
void attach(PreparedPlan& prepared, const std::vector<std::vector<PreparedPlan::Work>>& detached) {
  struct Host {
    PreparedPlan::Wave* wave;
    PreparedPlan::Work* work;
    int64_t room;
    std::vector<Item> pieces;
  };
  std::vector<Host> hosts;
  for (size_t d = 0; d < prepared.waves.size(); d++) {
    auto& wave = prepared.waves[d];
    for (auto& w : wave.work)
      if (room_beside(w.item)) hosts.push_back({&wave, &w, room_beside(w.item), {}});
    int64_t tokens = 0, room = 0;
    for (const auto& piece : detached[d]) tokens += tokens_of(piece.item);
    for (const auto& host : hosts) room += host.room;
    size_t at = 0;
    int64_t before = 0, dealt = 0;  // room of the hosts up to `at`, tokens dealt to them
    for (const auto& piece : detached[d]) {
      while (at + 1 < hosts.size() && dealt * room >= (before + hosts[at].room) * tokens)
        before += hosts[at++].room;
      hosts[at].pieces.push_back(piece.item);
      hosts[at].work->cost += 10 * int64_t{tokens_of(piece.item)} * rows_of(piece.item);
      dealt += tokens_of(piece.item);
    }
    for (auto& host : hosts) host.room -= room ? host.room * tokens / room : 0;
  }
  for (auto& host : hosts) {
    auto& beside = host.wave->beside;
    host.work->beside_begin = static_cast<int>(beside.size());
    beside.insert(beside.end(), host.pieces.begin(), host.pieces.end());
    host.work->beside_end = static_cast<int>(beside.size());
  }
}

double makespan_over_bound(const PreparedPlan& prepared, int threads) {
  int64_t took = 0, total = 0, longest = 0;
  for (const auto& wave : prepared.waves) {
    took += makespan(wave.work, threads);
    for (const auto& w : wave.work) {
      total += w.cost;
      longest = std::max(longest, w.cost);
    }
  }
  const double bound = std::max(static_cast<double>(total) / threads, static_cast<double>(longest));
  return bound > 0 ? static_cast<double>(took) / bound : 1.0;
}

}  // namespace

PreparedPlan prepare(const PlanArrays& arrays, Layout layout, int group, int kv_heads, int dim,
                     int threads, bool leaves) {
  check_plan(arrays, layout);
  PreparedPlan prepared{arrays.plan,
                        layout,
                        group,
                        kv_heads,
                        dim,
                        arrays.num_rows,
                        arrays.num_pages,
                        any_run(arrays, is_coded),
                        any_run(arrays, [](Layout stored) { return stored == Layout::kByHead; }),
                        {}};
  prepared.leaves = leaves;
  const auto nodes = nodes_of(arrays);
  check(!leaves || (nodes.size() == 1 && nodes[0].end > 0 && nodes[0].end % kStep == 0),
        "a part is one group of whole steps of 128 tokens");
  prepared.whole_spans = leaves && nodes[0].end % kSpan == 0;
  for (int64_t g = 0; g < arrays.num_groups; g++) {
    const auto& [row_begin, row_end, run_begin, run_end] = arrays.groups[g];
    check(nodes[g].leaf() || (nodes[g].held == row_end - row_begin && nodes[g].end % kStep == 0),
          "a group's children do not divide its rows, or it ends inside a step of 128 tokens");
    if (static_cast<size_t>(nodes[g].depth) >= prepared.waves.size())
      prepared.waves.resize(nodes[g].depth + 1);
    cut_rows(prepared, arrays, g, nodes[g], prepared.waves[nodes[g].depth].work);
    if (arrays.parents && arrays.parents[g] == kCarried)
      prepared.carried.emplace_back(row_begin, row_end);
  }
  if (prepared.waves.size() > 1 || leaves || !prepared.carried.empty())
    prepared.record_floats = 2 * kv_heads * state_floats(arrays.num_rows * group, dim);
  const auto detached = detach(prepared);
  for (auto& wave : prepared.waves) schedule(prepared, wave, threads);
  attach(prepared, detached);
  prepared.makespan = makespan_over_bound(prepared, threads);
  return prepared;
}

}  // namespace kvkeep::attention
