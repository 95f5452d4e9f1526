// Which tokens observed rows gave their threshold or more, once lse2 is final.

// The tokens of a step that observed rows looked at, and the last position at which one did.
struct Looked {
  uint64_t hit[2] = {0, 0};
  int32_t at[kStep];  // of tokens that were hit
  int32_t earliest = INT32_MAX;

  // Take in a row's hits; rows are best taken last first, as each token is then written once.
  void mark(const uint64_t (&mine)[2], int32_t position, bool stamps) {
    for (int j = 0; j < 2; j++) {
      for (uint64_t bits = position > earliest ? mine[j] : mine[j] & ~hit[j]; stamps && bits;
           bits &= bits - 1) {
        const int t = __builtin_ctzll(bits);
        int32_t& own = at[j * kPage + t];
        own = hit[j] >> t & 1 && own > position ? own : position;
      }
      hit[j] |= mine[j];
    }
    earliest = position < earliest ? position : earliest;
  }

  // Join tile j's tokens to what other items have found.
  void hand_out(const Job& job, const Item& item, const Step& step, int j) const {
    if (!hit[j]) return;
    const int64_t tile = int64_t{step.entry[j]} * job.cache.kv_heads + item.head;
    for (uint64_t bits = hit[j]; job.stamps && bits; bits &= bits - 1) {
      const int t = __builtin_ctzll(bits);
      const int32_t position = at[j * kPage + t];
      int32_t* stamp = job.stamps + tile * kPage + t;
      int32_t known = __atomic_load_n(stamp, __ATOMIC_RELAXED);
      while (known < position && !__atomic_compare_exchange_n(stamp, &known, position, true,
                                                              __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      }
    }
    __atomic_fetch_or(job.hits + tile, hit[j], __ATOMIC_RELAXED);
  }
};

// What a row's threshold and lse2 ask of a score.
template <class K>
inline V least_of(const Job& job, const Panel<K>& panel, int row) {
  return Isa::set1(job.lse2[panel.query[row]] + job.thresholds[panel.query[row]]);
}

// Whether something was noted of a step. Of one that was not attended anything may be said.
template <class K>
inline bool any_noted(const Panel<K>& panel, int position) {
  uint64_t any = 0;
  for (int row = 0; row < panel.rows; row++) {
    if (panel.position[row] < position) continue;
    uint64_t words[2];
    __builtin_memcpy(words, panel.noted[row].bits_at(position), sizeof(words));
    any |= words[0] | words[1];
  }
  return any != 0;
}

// Of what was noted while attending.
template <class K>
inline void look_back(const Job& job, const Panel<K>& panel, const Step& step, Looked& looked) {
  for (int row = panel.rows; row-- > 0;) {
    Noted& noted = panel.noted[row];
    if (panel.position[row] < step.position) continue;
    uint64_t words[2], mine[2];
    __builtin_memcpy(words, noted.bits_at(step.position), sizeof(words));
    for (int j = 0; j < 2; j++) {
      const int count = __builtin_popcountll(words[j]);
      mine[j] = Isa::spread(scores_from(noted.scores, count, least_of(job, panel, row)), words[j]);
      noted.scores += count;
    }
    looked.mark(mine, panel.position[row], job.stamps);
  }
}

// Of scores that are computed a second time.
template <class K>
inline void look_again(const Job& job, const Panel<K>& panel, const Step& step, Looked& looked) {
  Alone alone;
  in_panels(0, panel.rows, [&](int from, int to, bool prefetches) {
    score_step(job, panel, step, from, to, prefetches, alone);
    for (int row = to; row-- > from;) {
      uint64_t mine[2];
      seen_by(step, panel.position[row], mine);
      const float* s = panel.s + (row - from) * kStep;
      for (int j = 0; j < 2; j++)
        mine[j] &= scores_from(s + j * kPage, kPage, least_of(job, panel, row));
      looked.mark(mine, panel.position[row], job.stamps);
    }
  });
}

// Mark the tokens that an observed row of the panel gives a weight of at least its threshold; lse2
// is final by now.
template <class K>
uint64_t observe(const Job& job, const Item& item, char* scratch) {
  Panel<K> panel(scratch, job.cache.dim, item.row_end - item.row_begin);
  for (int row = item.row_begin; row < item.row_end; row++) {
    const int32_t place = item.first_place + row / job.group;
    const int64_t token = job.plan.order ? job.plan.order[place] : place;
    if (__builtin_isfinite(job.thresholds[token * job.cache.kv_heads * job.group]))
      panel.push(job, item, row);
  }
  if (panel.rows == 0) return 0;
  uint64_t bytes = 0;
  int run = item.run_begin;
  const int last = panel.last < item.end - 1 ? panel.last : item.end - 1;
  for (int position = item.begin; position <= last; position += kStep) {
    Step step;
    if (job.scores && !any_noted(panel, position)) continue;
    const int fetched = job.scores ? -1 : last;  // what was noted is all that is read
    if (!find_step(job, item, last, fetched, position, run, step)) continue;
    Looked looked;
    if (job.scores) {
      look_back(job, panel, step, looked);
    } else {
      bytes += step.bytes(job.cache.dim, true);
      look_again(job, panel, step, looked);
    }
    for (int j = 0; j < 2; j++)
      if (step.tile[j]) looked.hand_out(job, item, step, j);
  }
  return bytes;
}
