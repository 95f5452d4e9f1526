// The loop nest of attention over items: whole groups, pieces of them, folds.

template <class K>
void finish(const Job& job, const Panel<K>& panel, const State& state) {
  const int dim = job.cache.dim;
  for (int r = 0; r < panel.rows; r++) {
    auto* out = static_cast<typename K::B*>(job.out) + int64_t{panel.query[r]} * dim;
    finish_row<K>(state.m[r], state.l[r], state.o + int64_t{r} * dim, dim, out,
                  job.lse2 + panel.query[r]);
  }
}

inline void merge_states(const State& into, const State& from, int rows, int dim) {
  for (int r = 0; r < rows; r++) {
    const int64_t o = int64_t{r} * dim;
    merge_row(into.m[r], into.l[r], into.o + o, from.m[r], from.l[r], from.o + o, dim);
  }
}

inline void copy_states(const State& to, const State& from, int rows, int dim) {
  __builtin_memcpy(to.m, from.m, sizeof(float) * rows);
  __builtin_memcpy(to.l, from.l, sizeof(float) * rows);
  __builtin_memcpy(to.o, from.o, sizeof(float) * rows * dim);
}

// What an item's rows have gathered: the total of complete spans and the part of the last one.
struct Carried {
  State total, part;

  // In the records of a group that has a parent or children, otherwise in `memory`.
  Carried(const Job& job, const Item& item, float* memory) {
    const int dim = job.cache.dim, rows = item.row_end - item.row_begin;
    if (item.root && item.leaf) {
      total = State::at(memory, rows);
      part = State::at(memory + state_floats(rows, dim), rows);
      return;
    }
    const int64_t row = int64_t{item.first_place} * job.group + item.row_begin;
    for (int i = 0; i < 2; i++) {
      const int64_t at = (2 * int64_t{item.head} + i) * state_floats(job.record_rows, dim);
      const State all = State::at(job.records + at, job.record_rows);
      (i ? part : total) = {all.m + row, all.l + row, all.o + row * dim};
    }
  }
};

template <class K>
Panel<K> panel_of(const Job& job, const Item& item, char* scratch) {
  Panel<K> panel(scratch, job.cache.dim, item.row_end - item.row_begin);
  for (int row = item.row_begin; row < item.row_end; row++) panel.push(job, item, row);
  return panel;
}

// Call fn(from, to, end of the span) for the spans' shares of [begin, end).
template <class Fn>
inline void in_spans(int begin, int end, Fn&& fn) {
  for (int from = begin; from < end;) {
    const int span_end = from / kSpan * kSpan + kSpan;
    const int to = span_end < end ? span_end : end;
    fn(from, to, span_end);
    from = to;
  }
}

// A span's share is complete.
template <class K>
inline void raise_floors(const Job& job, const Panel<K>& panel, const State& part) {
  for (int r = 0; job.scores && r < panel.rows; r++) panel.noted[r].raise(part.m[r], part.l[r]);
}

// A piece of a group's tokens: the states of its spans, left for `fold`.
template <class K, class Other>
uint64_t attend_piece(const Job& job, const Item& item, const Panel<K>& panel, Other& between) {
  const int dim = job.cache.dim;
  uint64_t bytes = 0;
  float* memory = job.states + item.states;
  in_spans(item.begin, item.end, [&](int from, int to, int) {
    const State state = State::at(memory, panel.rows);
    if (from % kSpan) {
      copy_states(state, Carried(job, item, nullptr).part, panel.rows, dim);
    } else {
      state.clear(panel.rows, dim);
    }
    bytes += walk(job, item, panel, from, to, state, between);
    raise_floors(job, panel, state);
    memory += state_floats(panel.rows, dim);
  });
  return bytes;
}

template <class K, class Other>
uint64_t attend_whole(const Job& job, const Item& item, const Panel<K>& panel, Other& between) {
  const int dim = job.cache.dim;
  const Carried carried(job, item, panel.memory);
  if (item.root) carried.total.clear(panel.rows, dim);
  uint64_t bytes = 0;
  in_spans(item.begin, item.end, [&](int from, int to, int span_end) {
    if (from % kSpan == 0) carried.part.clear(panel.rows, dim);
    bytes += walk(job, item, panel, from, to, carried.part, between);
    raise_floors(job, panel, carried.part);
    if (to == span_end) merge_states(carried.total, carried.part, panel.rows, dim);
  });
  if (!item.leaf) return bytes;
  if (item.end % kSpan) merge_states(carried.total, carried.part, panel.rows, dim);
  finish(job, panel, carried.total);
  return bytes;
}

template <class K>
uint64_t attend(const Job& job, const Item& item, Beside beside, char* scratch) {
  const Panel<K> panel = panel_of<K>(job, item, scratch);
  const auto with = [&](auto& between) {
    return item.states >= 0 ? attend_piece(job, item, panel, between)
                            : attend_whole(job, item, panel, between);
  };
  if (beside.count == 0) {
    Alone alone;
    return with(alone);
  }
  Between<K> between(job, item, beside, scratch + Panel<K>::bytes(job.cache.dim, panel.rows));
  const uint64_t bytes = with(between);
  return bytes + between.finish();
}

// Fold the states that a group's pieces left at item.states, left to right.
template <class K>
void fold(const Job& job, const Item& item, char* scratch) {
  const int dim = job.cache.dim;
  const Panel<K> panel = panel_of<K>(job, item, scratch);
  const Carried carried(job, item, panel.memory);
  if (item.root) carried.total.clear(panel.rows, dim);
  float* memory = job.states + item.states;
  in_spans(item.begin, item.end, [&](int, int to, int span_end) {
    const State state = State::at(memory, panel.rows);
    if (to == span_end || item.leaf) {
      merge_states(carried.total, state, panel.rows, dim);
    } else {
      copy_states(carried.part, state, panel.rows, dim);
    }
    memory += state_floats(panel.rows, dim);
  });
  if (item.leaf) finish(job, panel, carried.total);
}

template <class K>
void merge(const void* outs, const float* lse2s, int64_t parts, int64_t rows, int64_t row, int dim,
           void* out, float* lse2, float* scratch) {
  float m = kEmpty, l = 0;
  float *part = scratch, *o = scratch + dim;
  __builtin_memset(o, 0, sizeof(float) * dim);
  for (int64_t i = 0; i < parts; i++) {
    K::widen(part, static_cast<const typename K::B*>(outs) + (i * rows + row) * dim, dim);
    merge_row(m, l, o, lse2s[i * rows + row], 1.0f, part, dim);
  }
  finish_row<K>(m, l, o, dim, static_cast<typename K::B*>(out) + row * dim, lse2 + row);
}

template <class K>
constexpr Kernels table() {
  return {&Panel<K>::bytes, &attend<K>, &fold<K>, &observe<K>, &merge<K>, &spin<K>};
}
