// The other baseline that attention on codes is measured against: a tile is unpacked to the bf16
// tile that it stands for, once for all rows, in the first-level cache, and multiplied as such. Of
// two or four bits each value is looked up among the few that its scale and min allow.

inline bool looks_up(Layout layout) { return is_coded(layout) && layout != Layout::kK8V8; }

// Keys [S/16][D/2][16][2] of a tile's codes.
template <class K, int kBits>
void halve_keys(const uint8_t* codes, int dim, const uint16_t* table, uint16_t* to, Fetch fetch) {
  constexpr int kAlong = 32 / kBits;  // channels of a line
  for (int t = 0; t < kPage; t += 16) {
    for (int d = 0; d < dim; d += kAlong) {
      K::template look_up<kBits>(codes, table + (d << kBits), to, 32);
      fetch.lines<1>();
      codes += 64;
      to += 16 * kAlong;
    }
  }
}

// Values [S/2][D][2] of a tile's codes.
template <class K, int kBits>
void halve_values(const uint8_t* codes, int dim, int partition, const uint16_t* table, uint16_t* to,
                  Fetch fetch) {
  constexpr int kAlong = 32 / kBits;  // tokens of a line
  for (int t = 0; t < kPage; t += kAlong) {
    for (int d = 0; d < dim; d += 16) {
      const int row = d / partition * kPage + t;
      K::template look_up<kBits>(codes, table + (row << kBits), to + t * dim + 2 * d, 2 * dim);
      fetch.lines<1>();
      codes += 64;
    }
  }
}

// Call fn with a constant, 2 or 4.
template <class Fn>
inline void with_bits(int bits, Fn&& fn) {
  if (bits == 2) return fn.template operator()<2>();
  fn.template operator()<4>();
}

// A step of tile j alone, in bf16: its keys or its values, in the panel's memory.
template <class K>
Step halved(const Job& job, const Panel<K>& panel, const Step& step, int j, bool keys,
            bool prefetches) {
  const int dim = job.cache.dim;
  const CodeShape shape(step.layout, dim);
  const CodeMemory memory(panel.codes, dim);
  const char* tile = step.tile[j] + (keys ? 0 : shape.v_codes);
  const char* scales = step.tile[j] + (keys ? shape.k_scale : shape.v_scale);
  const int count = keys ? dim : shape.partitions * kPage;
  widen_halves(memory.fold[0], scales, count);
  widen_halves(memory.low[0], scales + 2 * count, count);
  const int64_t ahead = prefetches ? step.ahead[j] : 0;
  if (ahead) prefetch_bytes(scales + ahead, 4 * count);
  const Fetch fetch(tile + ahead, ahead != 0);
  const auto* codes = reinterpret_cast<const uint8_t*>(tile);
  uint16_t* to = panel.halves + (keys ? 0 : kPage * dim);
  uint16_t* table = panel.halves + 2 * kPage * dim;
  with_bits(keys ? shape.k_bits : shape.v_bits, [&]<int kBits>() {
    K::template fill_table<kBits>(table, memory.fold[0], memory.low[0], count);
    if (keys) {
      halve_keys<K, kBits>(codes, dim, table, to, fetch);
    } else {
      halve_values<K, kBits>(codes, dim, shape.partition, table, to, fetch);
    }
  });
  if (const uint16_t* sinks = sinks_of(step, j, shape)) {
    for (int t = 0; t < kSinks; t++) {
      for (int d = 0; d < dim; d++) {
        const int at = keys ? d / 2 * 32 + 2 * t + d % 2 : t / 2 * 2 * dim + 2 * d + t % 2;
        to[at] = sinks[((keys ? 0 : kSinks) + t) * dim + d];
      }
    }
  }
  __atomic_fetch_add(job.decoded, 1, __ATOMIC_RELAXED);
  Step one{};
  one.position = step.position;
  one.layout = Layout::kBf16;
  one.tile[j] = reinterpret_cast<const char*>(panel.halves);
  return one;
}
