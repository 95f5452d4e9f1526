// Rows over tokens: states, panels of rows, steps of tokens, and the walk over a span's steps; see
// kvkeep/ops/layout.py for the order of sums.

constexpr float kEmpty = -__builtin_inff();

struct State {
  float *m, *l, *o;

  static State at(float* memory, int rows) { return {memory, memory + rows, memory + 2 * rows}; }

  void clear(int rows, int dim) const {
    for (int r = 0; r < rows; r++) m[r] = kEmpty;
    __builtin_memset(l, 0, sizeof(float) * rows);
    __builtin_memset(o, 0, sizeof(float) * rows * dim);
  }
};

// Merge one row's part (m, l, o) into its state; an empty part or state is skipped.
inline void merge_row(float& into_m, float& into_l, float* into_o, float m, float l, const float* o,
                      int dim) {
  if (m == kEmpty) return;
  if (into_m == kEmpty) {
    into_m = m;
    into_l = l;
    __builtin_memcpy(into_o, o, sizeof(float) * dim);
    return;
  }
  const float top = m > into_m ? m : into_m;
  const float old = exp2_one(into_m - top), fresh = exp2_one(m - top);
  for (int d = 0; d < dim; d += W) {
    V kept = Isa::mul(Isa::load(into_o + d), Isa::set1(old));
    Isa::store(into_o + d, Isa::fma(Isa::load(o + d), Isa::set1(fresh), kept));
  }
  into_l = into_l * old + l * fresh;
  into_m = top;
}

template <class K>
inline void finish_row(float m, float l, const float* o, int dim, typename K::B* out, float* lse2) {
  const bool empty = m == kEmpty;
  const V factor = Isa::set1(empty ? 0.0f : 1.0f / l);
  for (int d = 0; d < dim; d += W) K::store_out(out + d, Isa::mul(Isa::load(o + d), factor));
  *lse2 = empty ? kEmpty : m + __builtin_log2f(l);
}

// An item's rows and working memory; scores and weights are held for a panel of rows at a time.
template <class K>
struct Panel {
  using A = typename K::A;
  A *q, *p;
  float *s, *memory;
  int32_t *position, *query;
  int rows = 0, first = 0, last = 0;  // lowest and highest position

  static int64_t bytes(int dim, int rows) {
    return kPanel * kStep * (sizeof(A) + 4) + rows * (int64_t{sizeof(A)} * dim + 8) +
           8 * state_floats(rows, dim) + 512;
  }

  Panel(char* scratch, int dim, int most) {
    s = reinterpret_cast<float*>(scratch);
    p = reinterpret_cast<A*>(s + kPanel * kStep);
    q = p + kPanel * kStep;
    position = reinterpret_cast<int32_t*>(q + int64_t{most} * dim);
    query = position + most;
    memory = reinterpret_cast<float*>(query + most);
  }

  // Take in packed row `row` of the group.
  void push(const Job& job, const Item& item, int row) {
    const int32_t place = item.first_place + row / job.group;
    const int32_t token = job.plan.order ? job.plan.order[place] : place;
    const int head = item.head * job.group + row % job.group;
    const auto* from =
        static_cast<const typename K::B*>(job.q) + token * job.q_token + head * job.q_head;
    K::gather(q + int64_t{rows} * job.cache.dim, from, job.cache.dim);
    query[rows] = token * job.cache.kv_heads * job.group + head;
    const int32_t at = job.plan.positions[token];
    position[rows] = at;
    first = rows == 0 || at < first ? at : first;
    last = rows == 0 || at > last ? at : last;
    rows++;
  }
};

// One step's tiles as the panel sees them.
template <class K>
struct Step {
  int position;
  const typename K::B* tile[2];
  uint64_t live[2];
  int64_t ahead[2];  // bytes from a tile to the one two further on, for prefetching; 0 where there
                     // is none
  int32_t entry[2];
};

template <class K>
inline const typename K::B* find_tile(const Job& job, const Item& item, int32_t entry,
                                      uint64_t* live) {
  const Cache& cache = job.cache;
  *live = job.plan.masks ? job.plan.masks[cache.tile_of(entry, item.head)] : ~uint64_t{0};
  if (*live == 0) return nullptr;
  const int32_t page = job.plan.pages[entry];
  const int32_t id = page >= 0 ? cache.table[cache.tile_of(page, item.head)]
                               : job.plan.private_tiles[cache.tile_of(-1 - page, item.head)];
  const char* tile = cache.tile(id, int64_t{2} * kPage * cache.dim * sizeof(typename K::B));
  if (tile) return reinterpret_cast<const typename K::B*>(tile);
  __atomic_store_n(job.bad_tile, 1, __ATOMIC_RELAXED);
  *live = 0;
  return nullptr;
}

// Fill in the step at `position`; false where the rows up to `last` see none of its tiles. `run`
// moves forward only.
template <class K>
inline bool find_step(const Job& job, const Item& item, int last, int position, int& run,
                      Step<K>& step) {
  const Run* at = job.plan.runs;
  while (run < item.run_end && at[run].first_position + at[run].page_count * kPage <= position)
    run++;
  if (run == item.run_end || at[run].first_position > position) return false;
  step.position = position;
  for (int j = 0; j < 2; j++) {
    const int start = position + j * kPage;
    const int index = (start - at[run].first_position) / kPage;
    step.tile[j] = nullptr;
    step.live[j] = 0;
    step.ahead[j] = 0;
    if (start > last || index >= at[run].page_count) continue;
    step.entry[j] = at[run].page_begin + index;
    step.tile[j] = find_tile<K>(job, item, step.entry[j], &step.live[j]);
    if (step.tile[j] && index + 2 < at[run].page_count && start + kStep <= last) {
      uint64_t live;
      const auto* next = find_tile<K>(job, item, step.entry[j] + 2, &live);
      if (next)
        step.ahead[j] =
            reinterpret_cast<const char*>(next) - reinterpret_cast<const char*>(step.tile[j]);
    }
  }
  return step.tile[0] || step.tile[1];
}

// The first `count` of 64 bits.
inline uint64_t low_bits(int count) {
  return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
}

template <class K>
inline void seen_by(const Step<K>& step, int position, uint64_t (&seen)[2]) {
  for (int j = 0; j < 2; j++)
    seen[j] = low_bits(position - step.position - j * kPage + 1) & step.live[j];
}

// Who hears of the blocks that an item is computed in; nobody.
struct Alone {
  void block() const {}
  void step() const {}
};

// Cut rows [begin, end) into blocks of at most Isa::kRows, as even as can be.
template <class Fn>
inline void in_blocks(int begin, int end, Fn&& fn) {
  const int blocks = (end - begin + Isa::kRows - 1) / Isa::kRows;
  for (int block = 0; block < blocks; block++) {
    const int rows = (end - begin + blocks - block - 1) / (blocks - block);
    fn(begin, rows, ahead_of(block, blocks));
    begin += rows;
  }
}

// The rows [begin, end) outside which no row sees `position`.
template <class K>
inline void trim(const Panel<K>& panel, int position, int& begin, int& end) {
  begin = 0;
  end = panel.rows;
  if (panel.first >= position) return;
  while (begin < end && panel.position[begin] < position) begin++;
  while (end > begin && panel.position[end - 1] < position) end--;
}

// Cut [begin, end) into panels; fn(begin, end, whether it is the first, which prefetches for all).
template <class Fn>
inline void in_panels(int begin, int end, Fn&& fn) {
  for (int row = begin; row < end; row += kPanel)
    fn(row, row + kPanel < end ? row + kPanel : end, row == begin);
}

// Scores of rows [begin, end), at most a panel, to panel.s.
template <class K, class Between>
inline void score_step(const Job& job, const Panel<K>& panel, const Step<K>& step, int begin,
                       int end, bool prefetches, Between& between) {
  const int dim = job.cache.dim;
  for (int j = 0; j < 2; j++) {
    if (!step.tile[j]) continue;
    int from, to;
    trim(panel, step.position + j * kPage, from, to);
    in_blocks(from > begin ? from : begin, to < end ? to : end,
              [&](int row, int rows, Ahead share) {
                if (!step.ahead[j] || !prefetches) share.every = 0;
                score<K>(rows, panel.q + int64_t{row} * dim, step.tile[j], dim, job.scale,
                         panel.s + (row - begin) * kStep + j * kPage, step.ahead[j], share);
                between.block();
              });
  }
}

// How many of a step's tokens any of the rows [row, row + rows) sees, per tile.
template <class K>
inline void count_tokens(const Panel<K>& panel, const Step<K>& step, int row, int rows,
                         int (&tokens)[2]) {
  int last = panel.position[row];
  for (int r = 1; r < rows; r++)
    last = panel.position[row + r] > last ? panel.position[row + r] : last;
  for (int j = 0; j < 2; j++) {
    const int seen = step.tile[j] ? last - step.position - j * kPage + 1 : 0;
    tokens[j] = seen < 0 ? 0 : seen > kPage ? kPage : seen;
  }
}

// Weighted sums of rows [begin, end), at most a panel: all rows over some columns of V, which stay
// in the first-level cache, then over the next.
template <class K, class Between>
inline void weigh_step(const Panel<K>& panel, const Step<K>& step, int begin, int end,
                       bool prefetches, float* o, int dim, Between& between) {
  Values<K> values;
  for (int j = 0; j < 2; j++) {
    values.tile[j] = step.tile[j] ? step.tile[j] + kPage * dim : nullptr;
  }
  in_columns(dim, [&](int column, int cols) {
    in_blocks(begin, end, [&](int row, int rows, Ahead share) {
      if (!(step.ahead[0] && step.ahead[1] && prefetches)) share.every = 0;
      count_tokens(panel, step, row, rows, values.tokens);
      for (int j = 0; j < 2; j++) values.ahead[j] = step.ahead[j] + share.line * 64;
      weigh<K>(rows, panel.p + (row - begin) * kStep, values, o + int64_t{row} * dim, dim, column,
               cols, share);
      between.block();
    });
  });
}

// Carry the rows' state over tokens [begin, end) of one span; return the bytes read.
template <class K, class Between>
uint64_t walk(const Job& job, const Item& item, const Panel<K>& panel, int begin, int end,
              const State& state, Between& between) {
  const int dim = job.cache.dim;
  const int last = panel.last < end - 1 ? panel.last : end - 1;
  uint64_t tiles = 0;
  int run = item.run_begin;
  for (int position = begin; position <= last; position += kStep) {
    Step<K> step;
    if (!find_step<K>(job, item, last, position, run, step)) continue;
    tiles += (step.tile[0] != nullptr) + (step.tile[1] != nullptr);
    int first_row, end_row;
    trim(panel, position, first_row, end_row);
    in_panels(first_row, end_row, [&](int from, int to, bool prefetches) {
      score_step(job, panel, step, from, to, prefetches, between);
      for (int row = from; row < to; row++) {
        uint64_t seen[2];
        seen_by(step, panel.position[row], seen);
        soften<K>(panel.s + (row - from) * kStep, seen, panel.p + (row - from) * kStep,
                  state.m[row], state.l[row], state.o + int64_t{row} * dim, dim);
      }
      weigh_step(panel, step, from, to, prefetches, state.o, dim, between);
    });
    between.step();
  }
  return tiles * 2 * kPage * dim * sizeof(typename K::B);
}
