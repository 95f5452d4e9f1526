// Register blocks of attention: scores, softmax step and weighted sum, for the `Isa` of the
// including file's namespace.
//
// A kind K says how one layout is multiplied on that Isa: types A (panels of q and p) and B
// (tiles), kPair elements of a row consumed at a time, and the product itself. No element of a
// row's result depends on the other rows of a block.

using V = Isa::V;
constexpr int W = Isa::kWidth;
constexpr int kLine = 16 / W;  // vectors per 64 bytes of a tile, in both layouts

// acc[m][c] += sum over k of a[m][k] * b[k][c]. With kAhead = n > 0, every n-th line is prefetched
// `ahead` bytes further.
template <class K, int kRows, int kCols, int kAhead>
inline __attribute__((always_inline)) void multiply(V (&acc)[kRows][kCols], const typename K::A* a,
                                                    int64_t a_row, const typename K::B* b,
                                                    int64_t b_step, int64_t b_col, int steps,
                                                    int64_t ahead) {
  for (int k = 0; k < steps; k++) {
    typename K::Loaded loaded[kCols];
#pragma GCC unroll 8
    for (int c = 0; c < kCols; c++) {
      loaded[c] = K::load(b + c * b_col);
      if (kAhead > 0 && c % (kLine * (kAhead > 0 ? kAhead : 1)) == 0) {
        __builtin_prefetch(reinterpret_cast<const char*>(b + c * b_col) + ahead, 0, 2);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
      auto factor = K::broadcast(a + m * a_row);
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c++) acc[m][c] = K::dot(acc[m][c], factor, loaded[c]);
    }
    a += K::kPair;
    b += b_step;
  }
}

// Products alone, in as many registers as a block of scores uses.
template <class K>
int64_t spin(int64_t rounds, float* sink) {
  constexpr int kRows = Isa::kRows, kCols = Isa::kCols;
  alignas(64) typename K::B tile[W * K::kPair];
  alignas(64) typename K::A row[K::kPair];
  __builtin_memset(tile, static_cast<int>(rounds), sizeof(tile));  // nothing known when compiling
  __builtin_memset(row, static_cast<int>(rounds), sizeof(row));
  auto factor = K::broadcast(row);
  auto loaded = K::load(tile);
  V acc[kRows][kCols];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; c++) acc[m][c] = Isa::set1(m * kCols + c);
  }
  for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c++) acc[m][c] = K::dot(acc[m][c], factor, loaded);
    }
  }
  V sum = Isa::zero();
#pragma GCC unroll 8
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; c++) sum = Isa::add(sum, acc[m][c]);
  }
  *sink = Isa::first(sum);
  return rounds * kRows * kCols * W * K::kPair * 2;
}

// s[m][0..63] = scale * q[m] . k for one tile.
template <class K, int kRows, int kAhead>
__attribute__((noinline)) void score_block(const typename K::A* q, const typename K::B* k, int dim,
                                           float scale, float* s, int64_t ahead) {
  constexpr int kCols = Isa::kCols;
  constexpr int kTokens = kCols * W;
  const int64_t b_col = kTokens > 16 ? int64_t{16} * dim : W * K::kPair;
  for (int t = 0; t < kPage; t += kTokens) {
    V acc[kRows][kCols];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c++) acc[m][c] = Isa::zero();
    }
    multiply<K, kRows, kCols, kAhead>(acc, q, dim, k + int64_t{t} * dim, 16 * K::kPair, b_col,
                                      dim / K::kPair, ahead);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c++) {
        Isa::store(s + m * kStep + t + c * W, Isa::mul(acc[m][c], Isa::set1(scale)));
      }
    }
  }
}

// The V halves of a step's tiles: null where absent; `tokens` says how many of a tile's tokens any
// row of the block sees.
template <class K>
struct Values {
  const typename K::B* tile[2];
  int64_t ahead[2];
  int tokens[2];
};

// o[m][column..] += p[m] . v over the step's tiles. Where the count of tokens is odd, the last
// pair's second value is never looked at: it may be memory that nobody has written.
template <class K, int kRows, int kCols, int kAhead>
__attribute__((noinline)) void weigh_block(const typename K::A* p, const Values<K>& v, float* o,
                                           int dim, int column) {
  V acc[kRows][kCols];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; c++) acc[m][c] = Isa::load(o + int64_t{m} * dim + column + c * W);
  }
  for (int j = 0; j < 2; j++) {
    const typename K::A* a = p + j * kPage;
    const typename K::B* b = v.tile[j] + column * K::kPair;
    int steps = v.tokens[j] / K::kPair;
    multiply<K, kRows, kCols, kAhead>(acc, a, kStep, b, int64_t{dim} * K::kPair, W * K::kPair,
                                      steps, v.ahead[j]);
    if (v.tokens[j] % K::kPair) {
      a += steps * K::kPair;
      b += int64_t{steps} * dim * K::kPair;
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c++) {
        auto loaded = K::load_first(b + c * W * K::kPair);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; m++)
          acc[m][c] = K::dot(acc[m][c], K::broadcast(a + m * kStep), loaded);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; c++) Isa::store(o + int64_t{m} * dim + column + c * W, acc[m][c]);
  }
}

template <class K, int kRows, int kAhead, int kCols = Isa::kCols>
inline void weigh_columns(const typename K::A* p, const Values<K>& v, float* o, int dim, int column,
                          int cols) {
  if (cols == kCols) {
    weigh_block<K, kRows, kCols, kAhead>(p, v, o, dim, column);
  } else if constexpr (kCols > 1) {
    weigh_columns<K, kRows, kAhead, kCols - 1>(p, v, o, dim, column, cols);
  }
}

// Call fn(column, vectors) for passes over a row's vectors, as even as can be.
template <class Fn>
inline void in_columns(int dim, Fn&& fn) {
  int left = dim / W;
  for (int passes = (left + Isa::kCols - 1) / Isa::kCols, column = 0; passes > 0; passes--) {
    const int cols = (left + passes - 1) / passes;
    fn(column, cols);
    column += cols * W;
    left -= cols;
  }
}

// How the blocks of a step share the prefetching of the next one, so that memory and arithmetic
// overlap: block 0 takes every `every`-th line from the first, block 1 from the second, ...; 0:
// none is left to do.
struct Ahead {
  int every;
  int line;
};

inline Ahead ahead_of(int block, int blocks) {
  constexpr int kLines = Isa::kCols / kLine;  // per step of a product
  const int every = blocks == 1 || kLines == 1 ? 1 : blocks < 4 || kLines == 2 ? 2 : 4;
  return {block < every ? every : 0, block};
}

// Call fn with a constant 0, 1, 2 or 4.
template <class Fn>
inline void with_every(int every, Fn&& fn) {
  if (every == 0) return fn.template operator()<0>();
  if (every == 1) return fn.template operator()<1>();
  if (every == 2) return fn.template operator()<2>();
  fn.template operator()<4>();
}

// The blocks above for a number of rows known at run time, 1..Isa::kRows.
template <class K, int kRows = Isa::kRows>
inline void score(int rows, const typename K::A* q, const typename K::B* k, int dim, float scale,
                  float* s, int64_t ahead, Ahead share) {
  if (rows == kRows) {
    ahead += share.line * int64_t{16} * dim * sizeof(*k);  // one line per 16 tokens
    with_every(share.every,
               [&]<int kAhead>() { score_block<K, kRows, kAhead>(q, k, dim, scale, s, ahead); });
  } else if constexpr (kRows > 1) {
    score<K, kRows - 1>(rows, q, k, dim, scale, s, ahead, share);
  }
}

template <class K, int kRows = Isa::kRows>
inline void weigh(int rows, const typename K::A* p, const Values<K>& v, float* o, int dim,
                  int column, int cols, Ahead share) {
  if (rows == kRows) {
    with_every(share.every,
               [&]<int kAhead>() { weigh_columns<K, kRows, kAhead>(p, v, o, dim, column, cols); });
  } else if constexpr (kRows > 1) {
    weigh<K, kRows - 1>(rows, p, v, o, dim, column, cols, share);
  }
}

inline float exp2_one(float x) { return Isa::first(Isa::exp2(Isa::set1(x))); }

inline void scale_row(float* o, int dim, float factor) {
  for (int d = 0; d < dim; d += W) Isa::store(o + d, Isa::mul(Isa::load(o + d), Isa::set1(factor)));
}

// Weights as they are, for tiles of codes.
struct FloatWeights {
  using A = float;
  static void store_weights(float* p, V low, V high) {
    Isa::store(p, low);
    Isa::store(p + W, high);
  }
};

// Whether a row sees a score that is not a number.
inline bool sees_nan(const float* s, const uint64_t (&seen)[2]) {
  for (int t = 0; t < kStep; t++)
    if (s[t] != s[t] && seen[t / kPage] >> (t % kPage) & 1) return true;
  return false;
}

// One row's online-softmax step over scores s [kStep]: weights to p, state (m, l, o) carried on.
// Tokens whose bit in `seen` is clear get a weight of exactly 0. The guard on -inf keeps a row that
// sees nothing as it was. A score that is not a number makes l one that is not: that row's result
// shows it, whatever the others in its step are.
template <class K>
inline void soften(const float* s, const uint64_t (&seen)[2], typename K::A* p, float& m, float& l,
                   float* o, int dim) {
  constexpr int kVectors = kStep / W;
  const bool all = (seen[0] & seen[1]) == ~uint64_t{0};
  V x[kVectors];
  V top = Isa::set1(-__builtin_inff());
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; c++) {
    x[c] = Isa::load(s + c * W);
    if (!all) x[c] = Isa::keep(seen[c * W / kPage] >> (c * W % kPage), x[c]);
    top = Isa::max(top, x[c]);
  }
  const float peak = Isa::reduce_max(top);
  const float now = peak > m ? peak : m;
  if (now == -__builtin_inff()) {
    if (sees_nan(s, seen)) m = 0.0f, l = __builtin_nanf("");
    __builtin_memset(p, 0, sizeof(*p) * kStep);
    return;
  }
  V sum = Isa::zero();
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; c += 2) {
    V low = Isa::exp2(Isa::sub(x[c], Isa::set1(now)));
    V high = Isa::exp2(Isa::sub(x[c + 1], Isa::set1(now)));
    sum = Isa::add(sum, Isa::add(low, high));
    K::store_weights(p + c * W, low, high);
  }
  if (now != m) {
    if (m != -__builtin_inff()) {
      const float fade = exp2_one(m - now);
      l *= fade;
      scale_row(o, dim, fade);
    }
    m = now;
  }
  l += Isa::reduce_add(sum);
}
