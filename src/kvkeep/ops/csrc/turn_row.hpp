// The turning kernels, once for all instruction sets. Every element is computed by the same
// products and sums on each of them, in float32, and rounded once.
#pragma once

#include <cstdint>
#include <utility>

#include "elements.hpp"
#include "turn_kernels.hpp"

namespace kvkeep {

template <class S, class E>
struct TurnRow {
  using T = typename E::T;

  static void widen(const T* x, float* to, int64_t dim) {
    for (int64_t i = 0; i < dim; i += S::kLanes) S::store(to + i, E::load(x + i));
  }

  static void narrow(const float* x, T* to, int64_t dim) {
    for (int64_t i = 0; i < dim; i += S::kLanes) E::store(to + i, S::load(x + i));
  }

  static void order(const T* x, const int32_t* order, T* out, int64_t dim) {
    for (int64_t i = 0; i < dim; i++) out[i] = x[order[i]];
  }

  static void place(const float* __restrict from, const int32_t* __restrict order,
                    const float* __restrict factor, float* __restrict to, int64_t dim) {
    for (int64_t i = 0; i < dim; i++) to[i] = from[order[i]] * factor[i];
  }

  static void stage(const float* __restrict from, float* __restrict to, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
      const float low = from[i], high = from[half + i];
      to[2 * i] = low + high;
      to[2 * i + 1] = low - high;
    }
  }

  // Sum by a Hadamard matrix in its natural order; `from` is where the sums are afterwards. Each
  // stage moves an index's highest bit to its lowest, so that after all of them every bit is back.
  static void hadamard(float*& from, float*& to, int64_t dim) {
    for (int64_t done = 1; done < dim; done *= 2) {
      stage(from, to, dim / 2);
      std::swap(from, to);
    }
  }

  static void butterfly(const T* x, const int32_t* order, const float* factor, T* out, int64_t dim,
                        float* scratch) {
    float *from = scratch, *to = scratch + dim;
    widen(x, from, dim);
    for (int round = 0; round < 3; round++) {
      if (round) hadamard(from, to, dim);
      place(from, order + round * dim, factor + round * dim, to, dim);
      std::swap(from, to);
    }
    narrow(from, out, dim);
  }

  static void matrix(const T* x, const float* matrix, T* out, int64_t dim, float* scratch) {
    float *wide = scratch, *sum = scratch + dim;
    widen(x, wide, dim);
    for (int64_t i = 0; i < dim; i++) sum[i] = 0;
    for (int64_t k = 0; k < dim; k++) add_product(wide[k], matrix + k * dim, sum, dim);
    narrow(sum, out, dim);
  }

  static void add_product(float x, const float* __restrict row, float* __restrict sum,
                          int64_t dim) {
    for (int64_t i = 0; i < dim; i++) sum[i] += x * row[i];
  }
};

template <class S, class E>
constexpr auto turn_row_kernels_of() {
  using Row = TurnRow<S, E>;
  return TurnRowKernels<typename E::T>{&Row::order, &Row::butterfly, &Row::matrix};
}

template <class S>
constexpr TurnKernels turn_kernels_of() {
  return {turn_row_kernels_of<S, F32Elements<S>>(), turn_row_kernels_of<S, Bf16Elements<S>>()};
}

}  // namespace kvkeep
