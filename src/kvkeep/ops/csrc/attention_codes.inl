// Register blocks of attention on codes: a row's operand becomes bytes with a float32 scale per
// partition, bytes are multiplied by codes in 32-bit integers, exactly, and only their sums are
// floats again. See kvkeep/ops/codes.py and kvkeep/ops/reference_codes.py.

using I = Isa::I;

constexpr float kQueryTop = 127, kWeightTop = 255;  // the largest bytes
constexpr int kCodeRows = Isa::kCodeRows;           // rows that share an unpacking

inline int sum_of_bytes(const uint8_t* x) {
  int sum = 0;
  for (int t = 0; t < kPage; t++) sum += x[t];
  return sum;
}

// A block's operand, per (row, partition) of it: bytes, their scale, and what needs no codes.
struct Operand {
  uint8_t* bytes;
  float *scale, *bias;
};

// Memory for the blocks of a step, in a panel's.
struct CodeMemory {
  float *fold[2], *low[2];  // a tile's scales and mins as floats
  Operand operand[2];
  float* bias;  // of rows

  static constexpr int64_t most(int dim) { return 4 * int64_t{dim}; }  // partitions * kPage or dim
  static constexpr int64_t values(int dim) { return line_floats(kCodeRows * dim / 16 + 4); }
  static int64_t bytes(int dim) {
    return (4 * most(dim) + 4 * values(dim) + line_floats(kCodeRows)) * 4 +
           2 * kCodeRows * most(dim);
  }

  CodeMemory(float* memory, int dim) {
    const auto take = [&](int64_t count) {
      memory += count;
      return memory - count;
    };
    for (int j = 0; j < 2; j++) {
      fold[j] = take(most(dim));
      low[j] = take(most(dim));
      operand[j].scale = take(values(dim));
      operand[j].bias = take(values(dim));
    }
    bias = take(line_floats(kCodeRows));
    for (int j = 0; j < 2; j++) {
      operand[j].bytes = reinterpret_cast<uint8_t*>(take(kCodeRows * most(dim) / 4));
    }
  }
};

// Where the lines to be fetched next lie, in the order of memory; a block of products asks for as
// many as it reads.
struct Fetch {
  const char* at;
  int64_t step;  // 64, or 0 where nothing is left: the same line again costs next to nothing

  Fetch(const char* from, bool any) : at(from), step(any ? 64 : 0) {}

  template <int kLines>
  void lines() {
#pragma GCC unroll 4
    for (int i = 0; i < kLines; i++) {
      __builtin_prefetch(at, 0, 2);
      at += step;
    }
  }
};

// What is quantised: `from` times `fold`, and its dot product with `low`; a partition of a row.
struct Part {
  const float *from, *fold, *low;
};

// kCount parts of kVecs vectors each, reduced together: each in the same order of sums wherever it
// stands.
template <int kVecs, bool kSigned, int kCount>
inline __attribute__((always_inline)) void quantise_parts(const Part (&parts)[4], float unit,
                                                          uint8_t* bytes, float* scale,
                                                          float* bias) {
  constexpr float kTop = kSigned ? kQueryTop : kWeightTop;
  V u[kCount][kVecs];
  V top[4] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
  V sum[4] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) {
#pragma GCC unroll 16
    for (int k = 0; k < kVecs; k++) {
      const V value = Isa::load(parts[i].from + k * W);
      u[i][k] = Isa::mul(value, Isa::load(parts[i].fold + k * W));
      sum[i] = Isa::fma(value, Isa::load(parts[i].low + k * W), sum[i]);
      top[i] = Isa::max(top[i], kSigned ? Isa::abs(u[i][k]) : u[i][k]);
    }
  }
  const V tops = Isa::max4(top[0], top[1], top[2], top[3]);
  const V factors = Isa::over(kTop, tops);
  Isa::store4(scale, Isa::mul(tops, Isa::set1(unit / kTop)));
  Isa::store4(bias, Isa::mul(Isa::add4(sum[0], sum[1], sum[2], sum[3]), Isa::set1(unit)));
  const V factor[4] = {Isa::lane<0>(factors), Isa::lane<1>(factors), Isa::lane<2>(factors),
                       Isa::lane<3>(factors)};
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) {
#pragma GCC unroll 16
    for (int k = 0; k < kVecs; k++) u[i][k] = Isa::mul(u[i][k], factor[i]);
    Isa::template store_bytes<kVecs, kSigned>(bytes + i * kVecs * W, u[i]);
  }
}

// Bytes of x[row][h] * fold[h] for rows x partitions values of kVecs vectors each, `n` = kVecs * W:
// signed within +-127, or unsigned up to 255. scale = unit * their worth, bias = unit * x . low.
template <int kVecs, bool kSigned>
__attribute__((noinline)) void quantise(int rows, int partitions, const float* x, int64_t x_row,
                                        int64_t x_part, const float* fold, const float* low,
                                        float unit, Operand to) {
  constexpr int n = kVecs * W;
  const int count = rows * partitions;
  int row = 0, part = 0;
  for (int at = 0; at < count; at += 4) {
    const int here = count - at < 4 ? count - at : 4;
    Part parts[4] = {};
    for (int i = 0; i < here; i++) {
      parts[i] = {x + row * x_row + part * x_part, fold + part * n, low + part * n};
      if (++part == partitions) part = 0, row++;
    }
    uint8_t* bytes = to.bytes + at * n;
    float *scale = to.scale + at, *bias = to.bias + at;
    if (here == 4) quantise_parts<kVecs, kSigned, 4>(parts, unit, bytes, scale, bias);
    if (here == 3) quantise_parts<kVecs, kSigned, 3>(parts, unit, bytes, scale, bias);
    if (here == 2) quantise_parts<kVecs, kSigned, 2>(parts, unit, bytes, scale, bias);
    if (here == 1) quantise_parts<kVecs, kSigned, 1>(parts, unit, bytes, scale, bias);
  }
}

// The same for a partition whose size is known at run time: 16, 32, 48 or 64.
template <bool kSigned, int kLines = 4>
inline void quantise_any(int n, int rows, int partitions, const float* x, int64_t x_row,
                         int64_t x_part, const float* fold, const float* low, float unit,
                         Operand to) {
  if (n == kLines * 16) {
    quantise<kLines * kLine, kSigned>(rows, partitions, x, x_row, x_part, fold, low, unit, to);
  } else if constexpr (kLines > 1) {
    quantise_any<kSigned, kLines - 1>(n, rows, partitions, x, x_row, x_part, fold, low, unit, to);
  }
}

// Codes of one field; values' of 8 bits are less by 128, to be signed.
template <int kBits, bool kKeys, int kField>
inline I field_of(I bytes) {
  if constexpr (kBits == 8) return kKeys ? bytes : Isa::flip(bytes);
  return Isa::mask(Isa::template shift<kBits * kField>(bytes), (1 << kBits) - 1);
}

// acc[m][c] += sum over lines of x[m] . codes[c]: a line is a vector of four codes per lane and
// field, `step` bytes from the next; columns are vectors, 64 bytes' worth `outer` bytes apart.
template <int kBits, bool kKeys, int kRows, int kCols>
inline __attribute__((always_inline)) void multiply_codes(I (&acc)[kRows][kCols],
                                                          const uint8_t* codes, int64_t step,
                                                          int64_t outer, int lines,
                                                          const uint8_t* x, int64_t x_row,
                                                          Fetch& fetch) {
  constexpr int kFields = 8 / kBits;
  for (int line = 0; line < lines; line++) {
    const auto fields = [&]<int kField>() {
      I column[kCols];
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c++) {
        const uint8_t* at = codes + c / kLine * outer + c % kLine * 4 * W;
        column[c] = field_of<kBits, kKeys, kField>(Isa::bytes(at));
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; m++) {
        const I factor = Isa::quad(x + m * x_row + 4 * kField);
#pragma GCC unroll 8
        for (int c = 0; c < kCols; c++) {
          acc[m][c] = kKeys ? Isa::template dot<kBits == 8>(acc[m][c], column[c], factor)
                            : Isa::template dot<kBits == 8>(acc[m][c], factor, column[c]);
        }
      }
    };
    fields.template operator()<0>();
    if constexpr (kFields > 1) fields.template operator()<1>();
    if constexpr (kFields > 2) fields.template operator()<2>();
    if constexpr (kFields > 2) fields.template operator()<3>();
    fetch.lines<(kCols + kLine - 1) / kLine>();
    codes += step;
    x += 4 * kFields;
  }
}

// s[m][0..63] = sum over partitions of scale * integers, and the rows' bias, for one tile.
template <int kBits, int kRows>
__attribute__((noinline)) void score_codes(const uint8_t* codes, int partition, int partitions,
                                           Operand q, const float* bias, float* s, Fetch fetch) {
  constexpr int kCols = Isa::code_cols(kRows);
  constexpr int kChannels = 32 / kBits;  // of a line
  const int64_t tile = int64_t{64} * (partition * partitions / kChannels);
  const int64_t x_row = int64_t{partition} * partitions;
  for (int t = 0; t < kPage; t += kCols * W) {
    const uint8_t* lines = codes + t / 16 * tile + t % 16 * 4;
    for (int h = 0; h < partitions; h++) {
      I acc[kRows][kCols];
#pragma GCC unroll 8
      for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
        for (int c = 0; c < kCols; c++) acc[m][c] = Isa::none();
      }
      const int count = partition / kChannels;
      multiply_codes<kBits, true, kRows, kCols>(acc, lines + int64_t{64} * h * count, 64, tile,
                                                count, q.bytes + h * partition, x_row, fetch);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; m++) {
        const V scale = Isa::set1(q.scale[m * partitions + h]);
#pragma GCC unroll 8
        for (int c = 0; c < kCols; c++) {
          float* to = s + m * kStep + t + c * W;
          V before = h ? Isa::load(to) : Isa::set1(bias[m]);
          Isa::store(to, Isa::fma(Isa::to_float(acc[m][c]), scale, before));
        }
      }
    }
  }
}

// The V codes of a step's tiles: null where absent; and the operands of the rows' weights on them.
struct CodedValues {
  const uint8_t* codes[2];
  Operand p[2];
};

// o[m][0..kCols * W) += weights . values of partition h over the step's tiles; `column` is that of
// o, in channels.
template <int kBits, int kRows, int kCols>
__attribute__((noinline)) void weigh_codes(const CodedValues& v, int h, int partitions, float* o,
                                           int dim, int column, Fetch (&fetches)[2]) {
  constexpr int kTokens = 32 / kBits;  // of a line
  for (int j = 0; j < 2; j++) {
    if (!v.codes[j]) continue;
    const uint8_t* x = v.p[j].bytes + h * kPage;
    Fetch fetch = fetches[j];
    I acc[kRows][kCols];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
      I start = Isa::none();
      if constexpr (kBits == 8) start = Isa::all(128 * sum_of_bytes(x + m * partitions * kPage));
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c++) acc[m][c] = start;
    }
    multiply_codes<kBits, false, kRows, kCols>(acc, v.codes[j] + int64_t{4} * column,
                                               int64_t{4} * dim, 64, kPage / kTokens, x,
                                               int64_t{partitions} * kPage, fetch);
    fetches[j] = fetch;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
      const V scale = Isa::set1(v.p[j].scale[m * partitions + h]);
      const V bias = Isa::set1(v.p[j].bias[m * partitions + h]);
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c++) {
        float* to = o + int64_t{m} * dim + column + c * W;
        Isa::store(to, Isa::fma(Isa::to_float(acc[m][c]), scale, Isa::add(Isa::load(to), bias)));
      }
    }
  }
}
