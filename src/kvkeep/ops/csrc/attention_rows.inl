// Rows and tokens: states, panels of rows, steps of tiles.

constexpr float kEmpty = -__builtin_inff();

struct State {
  float *m, *l, *o;

  static State at(float* memory, int rows) {
    const int64_t each = line_floats(rows);
    return {memory, memory + each, memory + 2 * each};
  }

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

// Memory for a coded tile in bf16, then a table of the sixteen values that its codes may stand for.
template <class K>
constexpr int64_t halves_bytes(int dim) {
  return K::kLooksUp ? int64_t{2} * (2 * kPage + 4 * 16) * dim : 0;
}

// What is noted of an observed row while it is attended: which tokens may turn out to have its
// threshold or more, and their scores. Its final lse2 is not known yet, but what it has summed so
// far bounds it from below.
struct Noted {
  char* bits;       // [its steps][2] words; null: nothing is noted
  float* scores;    // of tokens whose bit is set, side by side: where the next ones are
  float threshold;  // log2 of the weight that is looked for
  float floor;      // lse2 of the item's complete spans

  // Of a row of an item that begins at token `begin`.
  static Noted of(const Job& job, int begin, int query, int position) {
    const int heads = job.cache.kv_heads * job.group;
    if (!job.scores || job.kept[query / heads] < 0) return {nullptr, nullptr, 0, kEmpty};
    const int64_t steps = position / kStep + 1;
    float* own = job.scores + job.kept[query / heads] + query % heads * steps * kNoted;
    return {reinterpret_cast<char*>(own), own + kBits * steps + begin / kStep * kStep,
            job.thresholds[query], kEmpty};
  }

  char* bits_at(int position) const { return bits + position / kStep * (4 * kBits); }

  // A span of the item is complete.
  void raise(float m, float l) {
    if (!bits || m == kEmpty) return;
    const float span = m + __builtin_log2f(l);
    const float high = span > floor ? span : floor, low = span > floor ? floor : span;
    floor = low == kEmpty ? high : high + __builtin_log2f(1.0f + exp2_one(low - high));
  }

  // No score below it can have the threshold, if (m, l) is what the span has summed: the logarithm
  // lies above its chords. The slack is far more than rounding takes.
  float least(float m, float l) const {
    int32_t l_bits;
    __builtin_memcpy(&l_bits, &l, sizeof(l_bits));
    const float span = m + (l_bits - 0x3f800000) * 0x1p-23f;
    const float lse2 = span > floor ? span : floor;
    return lse2 - (0x1p-6f + 0x1p-17f * __builtin_fabsf(lse2)) + threshold;
  }
};

// An item's rows and working memory; scores and weights are held for a panel of rows at a time.
template <class K>
struct Panel {
  using A = typename K::A;
  A *q, *p;
  float *s, *wide, *codes, *memory;  // wide: queries as floats, where some tiles are codes
  uint16_t* halves;  // a coded tile in bf16, where that is asked for
  int32_t *position, *query;
  Noted* noted;
  int rows = 0, first = 0, last = 0;  // lowest and highest position

  static int64_t bytes(int dim, int rows) {
    const int64_t count = kPanel * kStep * (sizeof(A) + 4) +
                          rows * ((int64_t{sizeof(A)} + 4) * dim + 8 + int64_t{sizeof(Noted)}) +
                          CodeMemory::bytes(dim) + 8 * state_floats(rows, dim) +
                          halves_bytes<K>(dim) + 512;
    return (count + 63) / 64 * 64;
  }

  Panel(char* scratch, int dim, int most) {
    s = reinterpret_cast<float*>(scratch);
    p = reinterpret_cast<A*>(s + kPanel * kStep);
    q = p + kPanel * kStep;
    position = reinterpret_cast<int32_t*>(q + int64_t{most} * dim);
    query = position + most;
    noted = line_of<Noted>(query + most);
    codes = line_of<float>(noted + most);
    wide = codes + CodeMemory::bytes(dim) / 4;
    memory = wide + int64_t{most} * dim;
    halves = reinterpret_cast<uint16_t*>(memory + 2 * state_floats(most, dim));
  }

  // The first whole line of 64 bytes from there on.
  template <class T>
  static T* line_of(void* memory) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
  }

  // Take in packed row `row` of the group.
  void push(const Job& job, const Item& item, int row) {
    const int32_t place = item.first_place + row / job.group;
    const int32_t token = job.plan.order ? job.plan.order[place] : place;
    const int head = item.head * job.group + row % job.group;
    const auto* from =
        static_cast<const typename K::B*>(job.q) + token * job.q_token + head * job.q_head;
    K::gather(q + int64_t{rows} * job.cache.dim, from, job.cache.dim);
    if (job.coded) K::widen(wide + int64_t{rows} * job.cache.dim, from, job.cache.dim);
    query[rows] = token * job.cache.kv_heads * job.group + head;
    const int32_t at = job.plan.positions[token];
    position[rows] = at;
    noted[rows] = Noted::of(job, item.begin, query[rows], at);
    first = rows == 0 || at < first ? at : first;
    last = rows == 0 || at > last ? at : last;
    rows++;
  }
};

// One step's tiles as the panel sees them.
struct Step {
  int position;
  Layout layout;
  bool first;  // tile[0] is the coded one at position 0, followed by its sinks
  const char* tile[2];
  uint64_t live[2];
  int64_t ahead[2];  // bytes from a tile to the one two further on, for prefetching; 0 where there
                     // is none
  int32_t entry[2];

  // Of K and V, or of K alone.
  int64_t bytes(int dim, bool keys_alone = false) const {
    int64_t count = 0;
    for (int j = 0; j < 2; j++) {
      if (!tile[j]) continue;
      const bool sinks = first && j == 0;
      count += keys_alone ? key_bytes(layout, dim, sinks) : tile_bytes(layout, dim, sinks);
    }
    return count;
  }
};

inline const char* find_tile(const Job& job, const Item& item, int32_t entry, int64_t bytes,
                             uint64_t* live) {
  const Cache& cache = job.cache;
  *live = job.plan.masks ? job.plan.masks[cache.tile_of(entry, item.head)] : ~uint64_t{0};
  if (*live == 0) return nullptr;
  const int32_t page = job.plan.pages[entry];
  const int32_t id = page >= 0 ? cache.table[cache.tile_of(page, item.head)]
                               : job.plan.private_tiles[cache.tile_of(-1 - page, item.head)];
  if (const char* tile = cache.tile(id, bytes)) return tile;
  __atomic_store_n(job.bad_tile, 1, __ATOMIC_RELAXED);
  *live = 0;
  return nullptr;
}

// Fill in the step at `position`; false where the rows up to `last` see none of its tiles. `run`
// moves forward only. Tiles up to position `fetched` are worth fetching ahead.
inline bool find_step(const Job& job, const Item& item, int last, int fetched, int position,
                      int& run, Step& step) {
  const Run* at = job.plan.runs;
  while (run < item.run_end && at[run].first_position + at[run].page_count * kPage <= position)
    run++;
  if (run == item.run_end || at[run].first_position > position) return false;
  step.position = position;
  step.layout = job.cache.layout_of(at[run].layout, item.head);
  step.first = position == 0 && is_coded(step.layout);
  const int64_t bytes = tile_bytes(step.layout, job.cache.dim);
  for (int j = 0; j < 2; j++) {
    const int start = position + j * kPage;
    const int index = (start - at[run].first_position) / kPage;
    step.tile[j] = nullptr;
    step.live[j] = 0;
    step.ahead[j] = 0;
    if (start > last || index >= at[run].page_count) continue;
    step.entry[j] = at[run].page_begin + index;
    const int64_t own = step.first && j == 0 ? tile_bytes(step.layout, job.cache.dim, true) : bytes;
    step.tile[j] = find_tile(job, item, step.entry[j], own, &step.live[j]);
    if (step.tile[j] && index + 2 < at[run].page_count && start + kStep <= fetched) {
      uint64_t live;
      const char* next = find_tile(job, item, step.entry[j] + 2, bytes, &live);
      if (next) step.ahead[j] = next - step.tile[j];
    }
  }
  return step.tile[0] || step.tile[1];
}

// The first `count` of 64 bits.
inline uint64_t low_bits(int count) {
  return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
}

inline void seen_by(const Step& step, int position, uint64_t (&seen)[2]) {
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
