// The walk of a panel's rows over a span's steps; see kvkeep/ops/layout.py for the order of sums.

// Scores of rows [begin, end), at most a panel, to panel.s.
template <class K, class Between>
inline void score_step(const Job& job, const Panel<K>& panel, const Step& step, int begin, int end,
                       bool prefetches, Between& between) {
  const int dim = job.cache.dim;
  for (int j = 0; j < 2; j++) {
    if (!step.tile[j]) continue;
    int from, to;
    trim(panel, step.position + j * kPage, from, to);
    from = from > begin ? from : begin;
    to = to < end ? to : end;
    float* s = panel.s + (from - begin) * kStep + j * kPage;
    if (is_coded(step.layout)) {
      score_coded(job, panel, step, j, from, to, prefetches, s, between);
      continue;
    }
    const auto* keys = reinterpret_cast<const typename K::B*>(step.tile[j]);
    in_blocks(from, to, [&](int row, int rows, Ahead share) {
      if (!step.ahead[j] || !prefetches) share.every = 0;
      score<K>(rows, panel.q + int64_t{row} * dim, keys, dim, job.scale, s + (row - from) * kStep,
               step.ahead[j], share);
      between.block();
    });
  }
}

// Of the first `count` scores, at most 64, those that are `least` or more, a bit each.
inline uint64_t scores_from(const float* s, int count, V least) {
  uint64_t found = 0;
  for (int t = 0; t < count; t += W) found |= uint64_t{Isa::from(Isa::load(s + t), least)} << t;
  return found & low_bits(count);
}

// Note the tokens that observed rows [begin, end), at most a panel, may look at, before scores
// become weights.
template <class K>
inline void note(const Job& job, const Panel<K>& panel, const Step& step, int begin, int end,
                 const State& state) {
  if (!job.scores) return;
  for (int row = begin; row < end; row++) {
    Noted& noted = panel.noted[row];
    if (!noted.bits || panel.position[row] < step.position) continue;
    uint64_t seen[2], found[2];
    seen_by(step, panel.position[row], seen);
    const V least = Isa::set1(noted.least(state.m[row], state.l[row]));
    const float* s = panel.s + (row - begin) * kStep;
    float* to = noted.scores;  // where it is known that no store changes it
    for (int j = 0; j < 2; j++, s += kPage) {
      found[j] = scores_from(s, kPage, least) & seen[j];
      if (!found[j]) continue;
      for (int t = 0; t < kPage; t += W) {
        const uint64_t bits = found[j] >> t & low_bits(W);
        Isa::pack(to, static_cast<uint32_t>(bits), Isa::load(s + t));
        to += __builtin_popcountll(bits);
      }
    }
    noted.scores = to;
    __builtin_memcpy(noted.bits_at(step.position), found, sizeof(found));
  }
}

// How many of a step's tokens any of the rows [row, row + rows) sees, per tile.
template <class K>
inline void count_tokens(const Panel<K>& panel, const Step& step, int row, int rows,
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
inline void weigh_step(const Panel<K>& panel, const Step& step, int begin, int end, bool prefetches,
                       float* o, int dim, Between& between) {
  Values<K> values;
  for (int j = 0; j < 2; j++) {
    const auto* keys = reinterpret_cast<const typename K::B*>(step.tile[j]);
    values.tile[j] = keys ? keys + kPage * dim : nullptr;
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

// One step's softmax of rows [begin, end), at most a panel; weights to p, which may be panel.s.
template <class Weights, class K>
inline void soften_rows(const Panel<K>& panel, const Step& step, int begin, int end,
                        typename Weights::A* p, const State& state, int dim) {
  for (int row = begin; row < end; row++) {
    uint64_t seen[2];
    seen_by(step, panel.position[row], seen);
    const int at = (row - begin) * kStep;
    soften<Weights>(panel.s + at, seen, p + at, state.m[row], state.l[row],
                    state.o + int64_t{row} * dim, dim);
  }
}

// A coded step as the bf16 tiles that it stands for, one after the other.
template <class K, class Between>
void attend_halved(const Job& job, const Panel<K>& panel, const Step& step, int from, int to,
                   bool prefetches, const State& state, Between& between) {
  for (int j = 0; j < 2; j++) {
    if (!step.tile[j]) continue;
    score_step(job, panel, halved(job, panel, step, j, true, prefetches), from, to, false, between);
  }
  soften_rows<K>(panel, step, from, to, panel.p, state, job.cache.dim);
  for (int j = 0; j < 2; j++) {
    if (!step.tile[j]) continue;
    weigh_step(panel, halved(job, panel, step, j, false, prefetches), from, to, false, state.o,
               job.cache.dim, between);
  }
}

// Carry the rows' state over tokens [begin, end) of one span; return the bytes read.
template <class K, class Between>
uint64_t walk(const Job& job, const Item& item, const Panel<K>& panel, int begin, int end,
              const State& state, Between& between) {
  const int dim = job.cache.dim;
  const int last = panel.last < end - 1 ? panel.last : end - 1;
  const int fetched = panel.last < item.end - 1 ? panel.last : item.end - 1;
  uint64_t bytes = 0;
  int run = item.run_begin;
  for (int position = begin; position <= last; position += kStep) {
    Step step;
    if (!find_step(job, item, last, fetched, position, run, step)) continue;
    bytes += step.bytes(dim);
    int first_row, end_row;
    trim(panel, position, first_row, end_row);
    in_panels(first_row, end_row, [&](int from, int to, bool prefetches) {
      if constexpr (K::kLooksUp) {
        if (job.halves && looks_up(step.layout))
          return attend_halved(job, panel, step, from, to, prefetches, state, between);
      }
      score_step(job, panel, step, from, to, prefetches, between);
      note(job, panel, step, from, to, state);
      if (is_coded(step.layout)) {
        soften_rows<FloatWeights>(panel, step, from, to, panel.s, state, dim);
        weigh_coded(job, panel, step, from, to, prefetches, state.o, between);
      } else {
        soften_rows<K>(panel, step, from, to, panel.p, state, dim);
        weigh_step(panel, step, from, to, prefetches, state.o, dim, between);
      }
    });
    between.step();
  }
  return bytes;
}
