// The sampling kernels, once for all instruction sets. A weight's bits depend on its logit alone,
// and a block is summed in sixteen lanes everywhere, so that instruction sets differ by rounding
// within a weight only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "elements.hpp"
#include "sample_kernels.hpp"

namespace kvkeep {

template <class S, class E>
struct SampleRow {
  using Vec = typename S::Vec;
  using T = typename E::T;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kSumLanes = 16;
  static constexpr int kSums = kSumLanes / kLanes;
  static constexpr int64_t kChunk = 4096;  // searched again for its largest element; whole blocks
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  // 2^t for t in [-126, 0], within 2 units in the last place; exactly 1 at 0. (2^r - 1) / r is
  // interpolated at Chebyshev's points of [-0.5, 0.5] (derived).
  static Vec exp2(Vec t) {
    const Vec shift = S::set(12582912.0f);  // 1.5 * 2^23: a sum with it is rounded to an integer
    Vec shifted = S::add(t, shift);
    Vec r = S::sub(t, S::sub(shifted, shift));
    constexpr float kCoefficients[] = {1.33908674e-03f, 9.61805667e-03f, 5.55035710e-02f,
                                       2.40226509e-01f, 6.93147188e-01f, 1.0f};
    Vec p = S::set(1.54614475e-04f);
    for (float c : kCoefficients) p = S::fma(p, r, S::set(c));
    return S::add_exponent(p, shifted);
  }

  static Vec weigh(Vec x, Vec top, Vec scale) {
    return exp2(S::max(S::mul(S::sub(x, top), scale), S::set(-120.0f)));
  }

  struct Running {
    Vec top[4], poison[4];

    // Multiplied by 0, infinity turns into what is not a number, and that stays; -inf is let pass.
    void take(int i, Vec x) {
      top[i] = S::max(top[i], x);
      Vec finite = S::max(S::set(std::numeric_limits<float>::lowest()), x);
      poison[i] = S::fma(finite, S::zero(), poison[i]);
    }

    float value() const {
      float lanes[kLanes], best = -kInfinity, sum = 0;
      S::store(lanes, S::max(S::max(top[0], top[1]), S::max(top[2], top[3])));
      for (float lane : lanes) best = std::max(best, lane);
      S::store(lanes, S::add(S::add(poison[0], poison[1]), S::add(poison[2], poison[3])));
      for (float lane : lanes) sum += lane;
      return best + sum;
    }
  };

  static float value_of(const T* p) {
    T padded[kLanes] = {*p};
    float lanes[kLanes];
    S::store(lanes, E::load(padded));
    return lanes[0];
  }

  static float largest_of(const T* x, int64_t count) {
    Running running;
    for (int i = 0; i < 4; i++) {
      running.top[i] = S::set(-kInfinity);
      running.poison[i] = S::zero();
    }
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
      for (int v = 0; v < 4; v++) running.take(v, E::load(x + i + v * kLanes));
    for (; i + kLanes <= count; i += kLanes) running.take(0, E::load(x + i));
    for (; i < count; i++) running.take(0, S::set(value_of(x + i)));
    return running.value();
  }

  static Largest largest(const T* x, int64_t count) {
    float best = -kInfinity;
    int64_t id = 0;
    for (int64_t first = 0; first < count; first += kChunk) {
      float value = largest_of(x + first, std::min(kChunk, count - first));
      if (value != value) return {value, first};
      if (value > best) {
        best = value;
        id = first;
      }
    }
    while (largest_of(x + id, std::min(kBlock, count - id)) != best) id += kBlock;
    while (value_of(x + id) != best) id++;
    return {best, id};
  }

  static float sum_lanes(const Vec* sums) {
    float lanes[kSumLanes];
    for (int v = 0; v < kSums; v++) S::store(lanes + v * kLanes, sums[v]);
    for (int half = kSumLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
  }

  // Add up a block of values, the v-th vector of them given by at(v).
  template <class At>
  static float sum_block(At at) {
    Vec sums[kSums];
    for (auto& sum : sums) sum = S::zero();
    for (int v = 0; v < kBlock / kLanes; v++) sums[v % kSums] = S::add(sums[v % kSums], at(v));
    return sum_lanes(sums);
  }

  static void block_weights(const T* x, int64_t count, const Weighing& how, int64_t block,
                            float* weights) {
    const int64_t first = block * kBlock, size = std::min(kBlock, count - first);
    T padded[kBlock] = {};
    std::copy_n(x + first, size, padded);
    for (int64_t i = 0; i < kBlock; i += kLanes)
      S::store(weights + i, weigh(E::load(padded + i), S::set(how.top), S::set(how.scale)));
    for (int64_t i = 0; i < kBlock; i++) {
      bool kept = weights[i] > how.bound || (weights[i] == how.bound && first + i < how.ties);
      if (i >= size || !kept) weights[i] = 0;
    }
  }

  static void block_sums(const T* x, int64_t count, const Weighing& how, int64_t first,
                         int64_t last, float* sums) {
    const Vec top = S::set(how.top), scale = S::set(how.scale), bound = S::set(how.bound);
    for (int64_t block = first; block < last; block++) {
      const int64_t begin = block * kBlock, end = begin + kBlock;
      auto weight = [&](int v) { return weigh(E::load(x + begin + v * kLanes), top, scale); };
      if (end <= count && end <= how.ties) {
        sums[block] = sum_block([&](int v) { return S::keep_from(weight(v), bound); });
      } else if (end <= count && begin >= how.ties) {
        sums[block] = sum_block([&](int v) { return S::keep_above(weight(v), bound); });
      } else {
        float weights[kBlock];
        block_weights(x, count, how, block, weights);
        sums[block] = sum_block([&](int v) { return S::load(weights + v * kLanes); });
      }
    }
  }
};

template <class S>
constexpr SampleKernels sample_kernels_of() {
  return {
      .largest_f32 = &SampleRow<S, F32Elements<S>>::largest,
      .largest_bf16 = &SampleRow<S, Bf16Elements<S>>::largest,
      .block_weights_f32 = &SampleRow<S, F32Elements<S>>::block_weights,
      .block_weights_bf16 = &SampleRow<S, Bf16Elements<S>>::block_weights,
      .block_sums_f32 = &SampleRow<S, F32Elements<S>>::block_sums,
      .block_sums_bf16 = &SampleRow<S, Bf16Elements<S>>::block_sums,
  };
}

}  // namespace kvkeep
