// Steps whose tiles are codes: scores and weighted sums of a panel's rows, block by block.

inline void widen_halves(float* to, const char* from, int64_t count) {
  const auto* halves = reinterpret_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < count; i += W) Isa::store(to + i, Isa::half(halves + i));
}

inline void prefetch_bytes(const char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

// Cut rows [begin, end) into blocks that share an unpacking, as even as can be.
template <class Fn>
inline void in_code_blocks(int begin, int end, Fn&& fn) {
  for (int left = (end - begin + kCodeRows - 1) / kCodeRows; left > 0; left--) {
    const int rows = (end - begin + left - 1) / left;
    fn(begin, rows);
    begin += rows;
  }
}

// Call fn with constants: bits of a code, rows of a block.
template <int kRows = kCodeRows, class Fn>
inline void with_shape(int bits, int rows, Fn&& fn) {
  if (rows == kRows) {
    if (bits == 2) return fn.template operator()<2, kRows>();
    if (bits == 4) return fn.template operator()<4, kRows>();
    return fn.template operator()<8, kRows>();
  }
  if constexpr (kRows > 1) with_shape<kRows - 1>(bits, rows, fn);
}

// The scores of sinks [kSinks, D] bf16 take the place of the first tokens'.
inline void score_sinks(const float* q, const uint16_t* keys, int dim, float scale, float* s) {
  V sum[kSinks] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
  for (int d = 0; d < dim; d += W) {
    const V value = Isa::load(q + d);
#pragma GCC unroll 4
    for (int t = 0; t < kSinks; t++)
      sum[t] = Isa::fma(value, Isa::half(keys + t * dim + d), sum[t]);
  }
  Isa::store4(s, Isa::mul(Isa::add4(sum[0], sum[1], sum[2], sum[3]), Isa::set1(scale)));
}

// Add the sinks' weighted values to o, and leave their weights at 0 for the codes.
inline void weigh_sinks(float* p, const uint16_t* values, int dim, float* o) {
  for (int d = 0; d < dim; d += W) {
    V sum = Isa::load(o + d);
    for (int t = 0; t < kSinks; t++)
      sum = Isa::fma(Isa::set1(p[t]), Isa::half(values + t * dim + d), sum);
    Isa::store(o + d, sum);
  }
  for (int t = 0; t < kSinks; t++) p[t] = 0;
}

inline const uint16_t* sinks_of(const Step& step, int j, const CodeShape& shape) {
  return step.first && j == 0 && step.tile[0]
             ? reinterpret_cast<const uint16_t*>(step.tile[0] + shape.sinks)
             : nullptr;
}

// Scores of a block's rows by integers, q [rows, D].
inline void score_block_codes(const Job& job, const CodeShape& shape, const CodeMemory& memory,
                              const uint8_t* codes, const float* q, int rows, float* s,
                              Fetch fetch) {
  const Operand operand = memory.operand[0];
  quantise_any<true>(shape.partition, rows, shape.partitions, q, job.cache.dim, shape.partition,
                     memory.fold[0], memory.low[0], job.scale, operand);
  for (int r = 0; r < rows; r++) {
    float bias = operand.bias[r * shape.partitions];
    for (int h = 1; h < shape.partitions; h++) bias += operand.bias[r * shape.partitions + h];
    memory.bias[r] = bias;
  }
  with_shape(shape.k_bits, rows, [&]<int kBits, int kRows>() {
    score_codes<kBits, kRows>(codes, shape.partition, shape.partitions, operand, memory.bias, s,
                              fetch);
  });
}

// Scores of rows [from, to) on tile j of the step, to s, a row each kStep.
template <class K, class Between>
void score_coded(const Job& job, const Panel<K>& panel, const Step& step, int j, int from, int to,
                 bool prefetches, float* s, Between& between) {
  const int dim = job.cache.dim;
  const CodeShape shape(step.layout, dim);
  const CodeMemory memory(panel.codes, dim);
  const char* tile = step.tile[j];
  const auto* codes = reinterpret_cast<const uint8_t*>(tile);
  widen_halves(memory.fold[0], tile + shape.k_scale, dim);
  widen_halves(memory.low[0], tile + shape.k_scale + 2 * dim, dim);
  const int64_t ahead = prefetches ? step.ahead[j] : 0;
  Fetch fetch(tile + ahead, ahead != 0);
  if (ahead) prefetch_bytes(tile + ahead + shape.k_scale, 4 * dim);
  in_code_blocks(from, to, [&](int row, int rows) {
    const float* queries = panel.wide + int64_t{row} * dim;
    float* scores = s + int64_t{row - from} * kStep;
    if (job.decoded) {
      with_shape(shape.k_bits, rows, [&]<int kBits, int kRows>() {
        score_widened<kBits, kRows>(codes, dim, queries, memory.fold[0], memory.low[0], job.scale,
                                    scores, fetch);
      });
    } else {
      score_block_codes(job, shape, memory, codes, queries, rows, scores, fetch);
    }
    if (const uint16_t* sinks = sinks_of(step, j, shape)) {
      for (int r = 0; r < rows; r++)
        score_sinks(queries + int64_t{r} * dim, sinks, dim, job.scale, scores + r * kStep);
    }
    fetch.step = 0;
    between.block();
  });
}

// All columns of a block's rows.
template <int kBits, int kRows>
void weigh_block_codes(const CodedValues& values, const CodeShape& shape, float* o, int dim,
                       Fetch (&fetches)[2]) {
  constexpr int kCols = Isa::code_cols(kRows);
  for (int h = 0; h < shape.partitions; h++) {
    int column = h * shape.partition;
    const int end = column + shape.partition;
    for (; column + kCols * W <= end; column += kCols * W)
      weigh_codes<kBits, kRows, kCols>(values, h, shape.partitions, o, dim, column, fetches);
    for (; column < end; column += W)
      weigh_codes<kBits, kRows, 1>(values, h, shape.partitions, o, dim, column, fetches);
  }
}

// Weighted sums of rows [begin, end), at most a panel, whose weights are in panel.s.
template <class K, class Between>
void weigh_coded(const Job& job, const Panel<K>& panel, const Step& step, int begin, int end,
                 bool prefetches, float* o, Between& between) {
  const int dim = job.cache.dim;
  const CodeShape shape(step.layout, dim);
  const CodeMemory memory(panel.codes, dim);
  CodedValues values{};
  Fetch fetches[2] = {{nullptr, false}, {nullptr, false}};
  const int64_t halves = int64_t{shape.partitions} * kPage;
  for (int j = 0; j < 2; j++) {
    const char* tile = step.tile[j];
    if (!tile) continue;
    values.codes[j] = reinterpret_cast<const uint8_t*>(tile + shape.v_codes);
    values.p[j] = memory.operand[j];
    const int64_t ahead = prefetches ? step.ahead[j] : 0;
    fetches[j] = {tile + ahead + shape.v_codes, ahead != 0};
    widen_halves(memory.fold[j], tile + shape.v_scale, halves);
    widen_halves(memory.low[j], tile + shape.v_scale + 2 * halves, halves);
    if (ahead) prefetch_bytes(tile + ahead + shape.v_scale, 4 * halves);
  }
  in_code_blocks(begin, end, [&](int row, int rows) {
    float* weights = panel.s + int64_t{row - begin} * kStep;
    float* sums = o + int64_t{row} * dim;
    if (const uint16_t* sinks = sinks_of(step, 0, shape)) {
      for (int r = 0; r < rows; r++)
        weigh_sinks(weights + r * kStep, sinks + kSinks * dim, dim, sums + int64_t{r} * dim);
    }
    for (int j = 0; j < 2; j++) {
      if (!values.codes[j]) continue;
      if (job.decoded) {
        with_shape(shape.v_bits, rows, [&]<int kBits, int kRows>() {
          weigh_block_widened<kBits, kRows>(values.codes[j], shape, dim, weights + j * kPage,
                                            memory.fold[j], memory.low[j], sums, fetches[j]);
        });
        __atomic_fetch_add(job.decoded, 1, __ATOMIC_RELAXED);
      } else {
        quantise<kPage / W, false>(rows, shape.partitions, weights + j * kPage, kStep, 0,
                                   memory.fold[j], memory.low[j], 1.0f, values.p[j]);
      }
    }
    if (!job.decoded) {
      with_shape(shape.v_bits, rows, [&]<int kBits, int kRows>() {
        weigh_block_codes<kBits, kRows>(values, shape, sums, dim, fetches);
      });
    }
    fetches[0].step = fetches[1].step = 0;
    between.block();
  });
}
