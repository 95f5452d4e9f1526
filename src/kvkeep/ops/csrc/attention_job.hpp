// What an attention kernel is told: plain structs only, because this header is compiled once per
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvkeep::attention {

// The constants of kvkeep/ops/layout.py.
inline constexpr int kPage = 64;              // tokens per page and per tile
inline constexpr int kStep = 128;             // tokens per online-softmax step
inline constexpr int kSpan = 1024;            // tokens per carried state
inline constexpr int kPanel = 126;            // rows scored together: 21 blocks of 6
inline constexpr int kBits = 4;               // floats that a bit for each token of a step takes
inline constexpr int kNoted = kBits + kStep;  // floats noted of an observed row and step, at most
inline constexpr int kCarried = -2;           // parent of a group that goes on from elsewhere
inline constexpr int kSinks = 4;              // tokens that the first coded page keeps in 16 bits

// kvkeep.types.Layout; the first kLayouts are those of the model's dtype.
enum class Layout : int32_t {
  kF32 = 0,
  kBf16 = 1,
  kK2V2 = 5,
  kK4V2 = 6,
  kK4V4 = 7,
  kK8V8 = 8,
  kByHead = 9  // of a run alone: Cache::coded says which of the four a tile is
};
inline constexpr int kLayouts = 2;

inline constexpr int element_bytes(Layout layout) { return layout == Layout::kF32 ? 4 : 2; }
inline constexpr bool is_coded(Layout layout) { return layout >= Layout::kK2V2; }

// A coded tile's parts, as offsets in bytes; see kvkeep/ops/codes.py.
struct CodeShape {
  int k_bits, v_bits;
  int partition, partitions;  // channels of one, and how many
  int64_t k_scale, v_codes, v_scale, sinks, end;

  CodeShape(Layout layout, int dim) {
    k_bits = layout == Layout::kK2V2 ? 2 : layout == Layout::kK8V8 ? 8 : 4;
    v_bits = layout == Layout::kK8V8 ? 8 : layout == Layout::kK4V4 ? 4 : 2;
    const int lines = dim / 16;  // made several times a step: no division by what is not constant
    partition = lines % 4 == 0 ? 64 : lines % 3 == 0 ? 48 : lines % 2 == 0 ? 32 : 16;
    partitions = lines % 4 == 0   ? lines / 4
                 : lines % 3 == 0 ? lines / 3
                 : lines % 2 == 0 ? lines / 2
                                  : lines;
    k_scale = int64_t{kPage} * dim * k_bits / 8;
    v_codes = k_scale + 4 * dim;
    v_scale = v_codes + int64_t{kPage} * dim * v_bits / 8;
    sinks = (v_scale + 4 * partitions * kPage + 63) / 64 * 64;
    end = sinks + (int64_t{4} * kSinks * dim + 63) / 64 * 64;
  }
};

inline int64_t tile_bytes(Layout layout, int dim, bool first = false) {
  if (!is_coded(layout)) return int64_t{2} * kPage * dim * element_bytes(layout);
  const CodeShape shape(layout, dim);
  return first ? shape.end : shape.sinks;
}

// Of a tile, the part that scores are made of.
inline int64_t key_bytes(Layout layout, int dim, bool first) {
  if (!is_coded(layout)) return tile_bytes(layout, dim) / 2;
  return CodeShape(layout, dim).v_codes + (first ? 2 * kSinks * dim : 0);
}

// kvkeep.ops.layout.Run
struct Run {
  int32_t page_begin, page_count, first_position, layout;
};

// What becomes of codes: multiplied as they are, or widened as benchmarks compare with.
enum class Widen { kNo, kFloats, kHalves };

// kvkeep.ops.layout.AttentionPlan, less its groups; the arrays belong to the caller.
struct Plan {
  const int32_t* positions;      // [T]
  const int32_t* order;          // [T] query row at each place, or null: as they are
  const Run* runs;               // [R]
  const int32_t* pages;          // [E]
  const int32_t* private_tiles;  // [n, L, Hkv] or null
  const uint64_t* masks;         // [E, L, Hkv] or null
};

// kvkeep.ops.layout.LayerKV
struct Cache {
  char* base;
  int64_t bytes, unit_bytes;
  const int32_t* table;  // [page slots, L, Hkv]
  int64_t page_slots;
  int layers, layer, kv_heads, dim;
  const int32_t* coded;  // [Hkv] layouts that kByHead stands for in this layer, or null

  Layout layout_of(int32_t run, int head) const {
    const auto layout = static_cast<Layout>(run);
    return layout == Layout::kByHead ? static_cast<Layout>(coded[head]) : layout;
  }
  int64_t tile_of(int64_t page, int head) const {
    return (page * layers + layer) * kv_heads + head;
  }
  // Null where a tile of `size` bytes would lie outside the pool.
  char* tile(int32_t id, int64_t size) const {
    const int64_t at = id * unit_bytes;
    return at >= 0 && at + size <= bytes ? base + at : nullptr;
  }
};

// One call of attend.
struct Job {
  const void* q;            // [T, Hq, D] in the model's dtype
  int64_t q_token, q_head;  // strides in elements
  void* out;                // [T, Hq, D]
  float* lse2;              // [T, Hq]
  int group;                // G, query heads per KV head
  bool coded;               // some run's tiles are codes
  uint64_t* decoded;        // not null: codes are widened, and counted here
  bool halves;              // widened to bf16 where the kernels look codes up, else to floats
  float scale;              // log2(e) / sqrt(D)
  Plan plan;
  Cache cache;
  float* records;           // [Hkv][2] states of `record_rows` rows, see Item; or null
  int record_rows;          // T * G
  const float* thresholds;  // [T, Hq] or null: nothing is observed
  uint64_t* hits;           // [E, Hkv]
  int32_t* stamps;          // [E, Hkv, S] or null: only hits are asked for
  float* scores;            // noted of observed rows until lse2 is final; or null: computed anew
  const int64_t* kept;      // [T] where a row's notes [Hq, its steps' kNoted] begin; or -1
  float* states;            // where pieces leave theirs
  int* bad_tile;            // set where a tile id lies outside the pool
};

// Some rows of one group, one KV head, a range of tokens. Rows are (place in the plan's order, head
// in group) packed: row r is place r / G of the group, head r % G. A group that has a parent goes
// on from its rows' records, a group that has children leaves them there: the total of the spans
// that are complete, and the part of the span that its last token lies in.
struct Item {
  int32_t first_place, head;
  int32_t row_begin, row_end;
  int32_t run_begin, run_end;
  int32_t begin, end;  // tokens; begin is a multiple of a step
  bool root, leaf;
  int64_t states;  // of a piece: where in the job's its spans' go, one `state_floats` each; or -1
};

// Pieces of few rows within one span each, to be attended between the steps of an item of many.
struct Beside {
  const Item* pieces;
  int count;
};

// Rows' softmax states: m [rows], l [rows], O [rows, D], in one block of memory, each part from a
// whole line of 64 bytes on.
inline constexpr int64_t line_floats(int64_t count) { return (count + 15) / 16 * 16; }
inline constexpr int64_t state_floats(int rows, int dim) {
  return int64_t{rows} * dim + 2 * line_floats(rows);
}

// The kernels of one layout on one instruction set. They return the bytes of K and V read.
struct Kernels {
  int64_t (*scratch_bytes)(int dim, int rows);  // for an item and what is beside it
  uint64_t (*attend)(const Job& job, const Item& item, Beside beside, char* scratch);
  void (*fold)(const Job& job, const Item& item, char* scratch);
  uint64_t (*observe)(const Job& job, const Item& item, char* scratch);
  // Merge row `row` of parts [N, rows, D] and lse2s [N, rows].
  void (*merge)(const void* outs, const float* lse2s, int64_t parts, int64_t rows, int64_t row,
                int dim, void* out, float* lse2, float* scratch);
  // Do nothing but products in registers for `rounds`; return the flops: what the core can do.
  int64_t (*spin)(int64_t rounds, float* sink);
};

namespace portable {
extern const Kernels kKernels[kLayouts];
}
namespace avx2 {
extern const Kernels kKernels[kLayouts];
}
namespace avx512 {
extern const Kernels kKernels[kLayouts];
}

}  // namespace kvkeep::attention
