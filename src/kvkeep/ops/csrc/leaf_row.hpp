// The row kernels, once for all instruction sets. Tails are padded to whole vectors, so an
// element's bits do not depend on where in its row it stands.
#pragma once

#include <cstdint>

#include "elements.hpp"
#include "leaf_kernels.hpp"

namespace kvkeep {

template <class S, class E>
struct LeafRow {
  using Vec = typename S::Vec;
  using T = typename E::T;
  static constexpr int kLanes = S::kLanes;

  static Vec load_tail(const T* p, int64_t count) {
    T padded[kLanes] = {};
    for (int64_t i = 0; i < count; i++) padded[i] = p[i];
    return E::load(padded);
  }

  static void store_tail(T* p, int64_t count, Vec v) {
    T padded[kLanes];
    E::store(padded, v);
    for (int64_t i = 0; i < count; i++) p[i] = padded[i];
  }

  // Sum of squares: four running vectors, then lanes added in order.
  static float sum_squares(const T* x, int64_t dim) {
    constexpr int kSums = 4;
    Vec sum[kSums];
    for (auto& s : sum) s = S::zero();
    int64_t i = 0;
    for (; i + kSums * kLanes <= dim; i += kSums * kLanes) {
      for (int s = 0; s < kSums; s++) {
        Vec v = E::load(x + i + s * kLanes);
        sum[s] = S::fma(v, v, sum[s]);
      }
    }
    for (int s = 0; i < dim; i += kLanes, s++) {
      Vec v = dim - i < kLanes ? load_tail(x + i, dim - i) : E::load(x + i);
      sum[s] = S::fma(v, v, sum[s]);
    }
    float lanes[kLanes];
    S::store(lanes, S::add(S::add(sum[0], sum[1]), S::add(sum[2], sum[3])));
    float total = 0;
    for (float lane : lanes) total += lane;
    return total;
  }

  static void rms_norm(const T* x, const T* weight, T* out, int64_t dim, float eps) {
    float mean = sum_squares(x, dim) / static_cast<float>(dim);
    Vec inverse = S::set(1.0f / __builtin_sqrtf(mean + eps));
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
      Vec y = E::round(S::mul(E::load(x + i), inverse));
      E::store(out + i, S::mul(y, E::load(weight + i)));
    }
    if (i == dim) return;
    Vec y = E::round(S::mul(load_tail(x + i, dim - i), inverse));
    store_tail(out + i, dim - i, S::mul(y, load_tail(weight + i, dim - i)));
  }

  // e^x for x <= 88.3, within 2 units in the last place; below -87 it goes to the smallest normal
  // number.
  static Vec exp(Vec x) {
    x = S::max(S::set(-87.0f), S::min(S::set(88.0f), x));
    Vec n = S::round(S::mul(x, S::set(1.44269504089f)));
    Vec r = S::fma(n, S::set(-0.693359375f), x);
    r = S::fma(n, S::set(2.12194440e-4f), r);
    constexpr float kCoefficients[] = {
        1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f, 1.0f, 1.0f};
    Vec p = S::set(1.9875691500e-4f);
    for (float c : kCoefficients) p = S::fma(p, r, S::set(c));
    return S::scale(p, n);
  }

  static Vec silu_mul(Vec gate, Vec up) {
    Vec one = S::set(1.0f);
    Vec silu = S::div(gate, S::add(one, exp(S::sub(S::zero(), gate))));
    return S::mul(E::round(silu), up);
  }

  static void silu_mul_row(const T* gate, const T* up, T* out, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      E::store(out + i, silu_mul(E::load(gate + i), E::load(up + i)));
    if (i == count) return;
    store_tail(out + i, count - i,
               silu_mul(load_tail(gate + i, count - i), load_tail(up + i, count - i)));
  }

  static Vec product(Vec a, Vec b) { return E::round(S::mul(a, b)); }

  static void rotate(T* x, const T* cos, const T* sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t count = half - i < kLanes ? half - i : kLanes;
      auto at = [&](const T* p) { return count < kLanes ? load_tail(p, count) : E::load(p); };
      auto put = [&](T* p, Vec v) { count < kLanes ? store_tail(p, count, v) : E::store(p, v); };
      Vec low = at(x + i), high = at(x + half + i);
      Vec turned_low = product(high, at(sin + i)), turned_high = product(low, at(sin + half + i));
      put(x + i, S::sub(product(low, at(cos + i)), turned_low));
      put(x + half + i, S::add(product(high, at(cos + half + i)), turned_high));
    }
  }
};

template <class S>
constexpr LeafKernels leaf_kernels_of() {
  return {
      .rms_norm_f32 = &LeafRow<S, F32Elements<S>>::rms_norm,
      .rms_norm_bf16 = &LeafRow<S, Bf16Elements<S>>::rms_norm,
      .silu_mul_f32 = &LeafRow<S, F32Elements<S>>::silu_mul_row,
      .silu_mul_bf16 = &LeafRow<S, Bf16Elements<S>>::silu_mul_row,
      .rotate_f32 = &LeafRow<S, F32Elements<S>>::rotate,
      .rotate_bf16 = &LeafRow<S, Bf16Elements<S>>::rotate,
  };
}

}  // namespace kvkeep
