// The baseline that attention on codes is measured against: every code is widened to a float,
// scaled and shifted in registers, for all rows of a block at once, and multiplied in float32.

// scale * code + min of four codes a lane: byte kByte of each, field kField.
template <int kBits, int kField, int kByte>
inline V widened(I bytes, V scale, V low) {
  const I code =
      Isa::all_and(Isa::template shift_lanes<8 * kByte + kBits * kField>(bytes), (1 << kBits) - 1);
  return Isa::fma(Isa::to_float(code), scale, low);
}

// acc[m][c] += sum over lines of x[m] . values[c], as `multiply_codes`, with the values' scale and
// min along the sum.
template <int kBits, int kRows, int kCols>
inline __attribute__((always_inline)) void multiply_widened(
    V (&acc)[kRows][kCols], const uint8_t* codes, int64_t step, int64_t outer, int lines,
    const float* x, int64_t x_row, const float* scale, const float* low, Fetch& fetch) {
  constexpr int kFields = 8 / kBits;
  for (int line = 0; line < lines; line++) {
    const auto one = [&]<int kField, int kByte>() {
      constexpr int kAlong = 4 * kField + kByte;
      const V s = Isa::set1(scale[kAlong]), m0 = Isa::set1(low[kAlong]);
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c++) {
        const I bytes = Isa::bytes(codes + c / kLine * outer + c % kLine * 4 * W);
        const V value = widened<kBits, kField, kByte>(bytes, s, m0);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; m++)
          acc[m][c] = Isa::fma(value, Isa::set1(x[m * x_row + kAlong]), acc[m][c]);
      }
    };
    const auto field = [&]<int kField>() {
      one.template operator()<kField, 0>();
      one.template operator()<kField, 1>();
      one.template operator()<kField, 2>();
      one.template operator()<kField, 3>();
    };
    field.template operator()<0>();
    if constexpr (kFields > 1) field.template operator()<1>();
    if constexpr (kFields > 2) field.template operator()<2>();
    if constexpr (kFields > 2) field.template operator()<3>();
    fetch.lines<(kCols + kLine - 1) / kLine>();
    codes += step;
    x += 4 * kFields;
    scale += 4 * kFields;
    low += 4 * kFields;
  }
}

// s[m][0..63] = unit * q[m] . k for one tile.
template <int kBits, int kRows>
__attribute__((noinline)) void score_widened(const uint8_t* codes, int dim, const float* q,
                                             const float* scale, const float* low, float unit,
                                             float* s, Fetch fetch) {
  constexpr int kCols = Isa::code_cols(kRows);
  const int64_t tile = int64_t{2} * dim * kBits;
  for (int t = 0; t < kPage; t += kCols * W) {
    V acc[kRows][kCols];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c++) acc[m][c] = Isa::zero();
    }
    multiply_widened<kBits, kRows, kCols>(acc, codes + t / 16 * tile + t % 16 * 4, 64, tile,
                                          dim * kBits / 32, q, dim, scale, low, fetch);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c++)
        Isa::store(s + m * kStep + t + c * W, Isa::mul(acc[m][c], Isa::set1(unit)));
    }
  }
}

// o[m][column..] += p[m] . v of one tile; scale and low are those of the columns' partition.
template <int kBits, int kRows, int kCols>
__attribute__((noinline)) void weigh_widened(const uint8_t* codes, int dim, int column,
                                             const float* p, const float* scale, const float* low,
                                             float* o, Fetch& from) {
  Fetch fetch = from;
  V acc[kRows][kCols];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; c++) acc[m][c] = Isa::load(o + int64_t{m} * dim + column + c * W);
  }
  multiply_widened<kBits, kRows, kCols>(acc, codes + int64_t{4} * column, int64_t{4} * dim, 64,
                                        kPage * kBits / 32, p, kStep, scale, low, fetch);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; c++) Isa::store(o + int64_t{m} * dim + column + c * W, acc[m][c]);
  }
  from = fetch;
}

// All columns of a block's rows on one tile.
template <int kBits, int kRows>
void weigh_block_widened(const uint8_t* codes, const CodeShape& shape, int dim, const float* p,
                         const float* scale, const float* low, float* o, Fetch fetch) {
  constexpr int kCols = Isa::code_cols(kRows);
  for (int h = 0; h < shape.partitions; h++) {
    int column = h * shape.partition;
    const int end = column + shape.partition, at = h * kPage;
    for (; column + kCols * W <= end; column += kCols * W)
      weigh_widened<kBits, kRows, kCols>(codes, dim, column, p, scale + at, low + at, o, fetch);
    for (; column < end; column += W)
      weigh_widened<kBits, kRows, 1>(codes, dim, column, p, scale + at, low + at, o, fetch);
  }
}
