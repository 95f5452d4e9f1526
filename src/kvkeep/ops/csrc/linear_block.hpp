// The linear kernel, once for all instruction sets: `S` names vectors and `Source` how weights
// become operands. Every function here is a template over a type of its own instruction set, so no
// two objects share a copy.
#pragma once

#include <cstdint>

#include "linear_kernels.hpp"

namespace kvkeep {

template <class S>
struct LinearBlock {
  using Vec = typename S::Vec;
  static constexpr int kVecs = S::kBlockVecs;
  static constexpr int kLanes = S::kBlockVecs * S::kLanes;
  static constexpr int kMaxRows = S::kMaxRows;
  static constexpr int kChunk = S::kChunkUnits;
  static constexpr int64_t kChunkBytes = int64_t{kChunk} * kLanes * 4;

  struct Stream {  // what to prefetch during a tile
    const uint8_t* next;
    int64_t step;  // bytes per unit
  };

  // acc[m] += sum over units of x[m] * weights.
  template <class Source, int M, int Lines>
  [[gnu::always_inline]] static inline void tile(const uint8_t* w, const uint32_t* x,
                                                 int64_t x_stride, int64_t units, Stream stream,
                                                 Vec (&acc)[M][kVecs]) {
    const uint8_t* ahead = stream.next;
    for (int64_t u = 0; u < units; u++) {
      typename Source::Operand operand[kVecs];
      for (int v = 0; v < kVecs; v++) operand[v] = Source::load(w, v);
      for (int line = 0; line < Lines; line++) __builtin_prefetch(ahead + 64 * line, 0, 2);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        auto xv = Source::broadcast(x + m * x_stride);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v++) acc[m][v] = Source::madd(acc[m][v], operand[v], xv);
      }
      w += Source::kUnitBytes;
      ahead += stream.step;
      x++;
    }
  }

  template <int M>
  [[gnu::always_inline]] static inline void load(const float* from, Vec (&acc)[M][kVecs]) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; v++)
        acc[m][v] = from ? S::load(from + m * kLanes + v * S::kLanes) : S::zero();
  }

  template <int M>
  [[gnu::always_inline]] static inline void store(float* to, const Vec (&acc)[M][kVecs]) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; v++) S::store(to + m * kLanes + v * S::kLanes, acc[m][v]);
  }

  // Scale, add the bias, round and write one row of sums.
  static void finish(const BlockJob& job, int64_t row, const float* sums) {
    const bool whole = job.lanes == kLanes;
    const int64_t at = row * job.out_stride;
    float floats[kLanes];
    uint16_t halves[kLanes];
    float* to = whole && !job.out_bf16 ? static_cast<float*>(job.out) + at : floats;
    uint16_t* to_bf16 = whole && job.out_bf16 ? static_cast<uint16_t*>(job.out) + at : halves;
    for (int v = 0; v < kVecs; v++) {
      Vec y = S::load(sums + v * S::kLanes);
      if (job.scales) y = S::mul(y, S::load(job.scales + v * S::kLanes));
      if (job.bias) y = S::add(y, bias(job, v));
      if (job.out_bf16) {
        S::store_bf16(to_bf16 + v * S::kLanes, y);
      } else {
        S::store(to + v * S::kLanes, y);
      }
    }
    if (whole) return;
    for (int64_t i = 0; i < job.lanes; i++) {
      if (job.out_bf16) {
        static_cast<uint16_t*>(job.out)[at + i] = halves[i];
      } else {
        static_cast<float*>(job.out)[at + i] = floats[i];
      }
    }
  }

  static Vec bias(const BlockJob& job, int v) {
    int64_t first = v * S::kLanes;
    if (job.out_bf16) {
      auto* from = static_cast<const uint16_t*>(job.bias);
      if (first + S::kLanes <= job.lanes) return S::load_bf16(from + first);
      uint16_t tail[S::kLanes] = {};
      for (int64_t i = first; i < job.lanes; i++) tail[i - first] = from[i];
      return S::load_bf16(tail);
    }
    auto* from = static_cast<const float*>(job.bias);
    if (first + S::kLanes <= job.lanes) return S::load(from + first);
    float tail[S::kLanes] = {};
    for (int64_t i = first; i < job.lanes; i++) tail[i - first] = from[i];
    return S::load(tail);
  }

  // A panel of at most kMaxRows rows over all of K, accumulators in registers throughout.
  template <class Source, int M>
  static void thin(const BlockJob& job) {
    constexpr int kLines = (Source::kUnitBytes + 63) / 64;
    Vec acc[M][kVecs];
    load<M>(nullptr, acc);
    Stream stream{job.weights + S::kAheadBytes, Source::kUnitBytes};
    tile<Source, M, kLines>(job.weights, job.x, job.x_stride, job.units, stream, acc);
    store<M>(job.spill, acc);
    for (int m = 0; m < M; m++) finish(job, m, job.spill + m * kLanes);
  }

  // A panel's share of one chunk of K, accumulators carried from chunk to chunk in `spill`.
  template <class Source, int M>
  static void chunk(const BlockJob& job, const uint8_t* w, int64_t row, int64_t first,
                    int64_t units, Stream stream) {
    Vec acc[M][kVecs];
    float* spill = job.spill + row * kLanes;
    load<M>(first ? spill : nullptr, acc);
    tile<Source, M, 2>(w, job.x + row * job.x_stride + first, job.x_stride, units, stream, acc);
    store<M>(spill, acc);
    if (first + units < job.units) return;
    for (int m = 0; m < M; m++) finish(job, row + m, spill + m * kLanes);
  }

  template <class Source, int M = kMaxRows>
  static void call_thin(const BlockJob& job) {
    if (job.rows == M) return thin<Source, M>(job);
    if constexpr (M > 1) call_thin<Source, M - 1>(job);
  }

  template <class Source, int M = kMaxRows>
  static void call_chunk(int64_t rows, const BlockJob& job, const uint8_t* w, int64_t row,
                         int64_t first, int64_t units, Stream stream) {
    if (rows == M) return chunk<Source, M>(job, w, row, first, units, stream);
    if constexpr (M > 1) call_chunk<Source, M - 1>(rows, job, w, row, first, units, stream);
  }

  template <class Source>
  static const uint8_t* decode(const uint8_t* w, int64_t units, uint8_t* to) {
    using Native = typename Source::Native;
    for (int64_t u = 0; u < units; u++)
      for (int v = 0; v < kVecs; v++)
        Native::put(to + u * Native::kUnitBytes, v, Source::load(w + u * Source::kUnitBytes, v));
    return to;
  }

  template <class Source>
  static void run(const BlockJob& job) {
    using Native = typename Source::Native;
    constexpr bool kDecode = Source::kUnitBytes != Native::kUnitBytes;
    if (job.rows <= kMaxRows) return call_thin<Source>(job);
    int64_t panels = (job.rows + kMaxRows - 1) / kMaxRows;
    for (int64_t first = 0; first < job.units; first += kChunk) {
      int64_t units = job.units - first < kChunk ? job.units - first : kChunk;
      const uint8_t* w = job.weights + first * Source::kUnitBytes;
      const uint8_t* next = w + units * Source::kUnitBytes;
      const uint8_t* operands = kDecode ? decode<Source>(w, units, job.decoded) : w;
      for (int64_t p = 0; p < panels; p++) {
        int64_t row = job.rows * p / panels, end = job.rows * (p + 1) / panels;
        Stream stream{next + units * Source::kUnitBytes * p / panels, Source::kUnitBytes / panels};
        call_chunk<Native>(end - row, job, operands, row, first, units, stream);
      }
    }
  }
};

}  // namespace kvkeep
