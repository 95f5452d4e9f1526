// The coding kernel, once for all instruction sets. Every bit follows from the operations of
// kvkeep.quant.hack, in their order: float32, each rounded once, nothing fused.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "elements.hpp"
#include "encode_kernels.hpp"

namespace kvkeep {

template <class S, class E>
struct EncodeTile {
  using Vec = typename S::Vec;
  using T = typename E::T;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kTokens = 64;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its sums have no bits below one
  static constexpr float kLeastScale = std::numeric_limits<float>::min();

  using Lanes = float[kLanes];
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

  // A scale and a least value of each lane, as they are stored.
  struct Affine {
    Lanes scale, least;
  };

  struct Range {
    Vec low, high;
  };

  // ---- numbers

  static float widen(uint16_t x) {
    const uint32_t bits = uint32_t{x} << 16;
    float y;
    std::memcpy(&y, &bits, sizeof(y));
    return y;
  }

  // Nearest, ties to even; denormals stay what they are.
  static uint16_t narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }

  static float stored(float x) { return widen(narrow(x)); }

  static bool finite(uint16_t x) { return (x & 0x7f80) != 0x7f80; }

  static float usable(float scale) { return scale < kLeastScale ? 1.0f : scale; }

  // x in steps of `scale`, held between the first and the last code and rounded to the nearest,
  // ties to even: an integer in the lowest bits of kRound.
  static Vec coded(Vec x, Vec least, Vec scale, Vec top) {
    Vec steps = S::div(S::sub(x, least), scale);
    return S::add(S::min(S::max(steps, S::zero()), top), S::set(kRound));
  }

  static Words integers(Vec coded) {
    return reinterpret_cast<Words>(coded) ^ reinterpret_cast<Words>(S::set(kRound));
  }

  static void put_codes(uint8_t* to, Vec coded) {
    const Words words = integers(coded);
    uint32_t codes[kLanes];
    std::memcpy(codes, &words, sizeof(codes));
    for (int i = 0; i < kLanes; i++) to[i] = static_cast<uint8_t>(codes[i]);
  }

  // Not a number once x isn't finite.
  static Vec watch(Vec seen, Vec x) { return S::add(seen, S::sub(x, x)); }

  static bool is_finite(Vec seen) {
    Lanes lanes;
    S::store(lanes, seen);
    bool all = true;
    for (float x : lanes) all &= x == x;
    return all;
  }

  // ---- keys: a scale for each channel

  struct Sums {
    Vec above, along, spread;
  };

  static Sums add(const Sums& a, const Sums& b) {
    return {S::add(a.above, b.above), S::add(a.along, b.along), S::add(a.spread, b.spread)};
  }

  // Sum what `row` gives for `at`, at + kStride, at + 2 kStride ... below 64: halves are added
  // until one is left.
  template <int kStride, class Row>
  static Sums total(int at, const Row& row) {
    if constexpr (kStride == kTokens) {
      return row(at);
    } else {
      return add(total<2 * kStride>(at, row), total<2 * kStride>(at + kStride, row));
    }
  }

  static void ends(Range range, float top, Affine& to) {
    Lanes low, high;
    S::store(low, range.low);
    S::store(high, range.high);
    for (int i = 0; i < kLanes; i++) {
      to.least[i] = stored(low[i] + 0.0f);
      to.scale[i] = usable(stored((high[i] - to.least[i]) / top));
    }
  }

  static void fitted(const EncodeJob& job, const T* k, Range range, float top, Affine& to) {
    const Vec whole = S::sub(range.high, range.low), count = S::set(kTokens - job.begin);
    const Vec least = S::add(range.low, S::mul(whole, S::set(job.margin)));
    Lanes low, span, step;
    S::store(low, range.low);
    S::store(span, S::mul(whole, S::set(job.narrowed)));
    for (int i = 0; i < kLanes; i++) step[i] = span[i] > 0 ? span[i] / top : 1.0f;

    float codes[kTokens][kLanes];
    const int coded_tokens = static_cast<int>(kTokens - job.begin);
    const T* from = k + job.begin * job.dim;
    Vec sum = S::zero();
    for (int t = 0; t < coded_tokens; t++) {
      Vec code = S::sub(coded(E::load(from + t * job.dim), least, S::load(step), S::set(top)),
                        S::set(kRound));
      S::store(codes[t], code);
      sum = S::add(sum, code);
    }
    const Vec mean_code = S::div(sum, count);
    auto token = [&](int t) -> Sums {
      if (t >= coded_tokens) return {S::zero(), S::zero(), S::zero()};
      Vec code = S::sub(S::load(codes[t]), mean_code);
      Vec above = S::sub(E::load(from + t * job.dim), range.low);
      return {above, S::mul(code, above), S::mul(code, code)};
    };
    // The outer halves first, so that few sums wait for others.
    constexpr int kNodes = 8;
    Sums nodes[kNodes];
    for (int t = 0; t < kNodes; t++) nodes[t] = total<kNodes>(t, token);
    for (int half = kNodes / 2; half > 0; half /= 2)
      for (int t = 0; t < half; t++) nodes[t] = add(nodes[t], nodes[t + half]);
    Lanes centre, mean, slope, across;
    S::store(centre, mean_code);
    S::store(mean, S::div(nodes[0].above, count));
    S::store(slope, S::div(nodes[0].along, count));
    S::store(across, S::div(nodes[0].spread, count));
    for (int i = 0; i < kLanes; i++) {
      const float scale = stored(across[i] > 0 ? slope[i] / across[i] : span[i]);
      to.least[i] = stored(low[i] + mean[i] - (scale < kLeastScale ? 0.0f : scale * centre[i]));
      to.scale[i] = usable(scale);
    }
  }

  // Write scales, least values and a byte for each code; false where a channel isn't finite.
  static bool keys(const EncodeJob& job, const T* k, uint8_t* tile, uint8_t* codes) {
    const float top = static_cast<float>((1 << job.k_bits) - 1);
    auto* scales = reinterpret_cast<uint16_t*>(tile + job.k_scale);
    Vec seen = S::zero();
    bool whole = true;
    for (int64_t d = 0; d < job.dim; d += kLanes) {
      Range range{E::load(k + job.begin * job.dim + d), E::load(k + job.begin * job.dim + d)};
      for (int64_t t = job.begin; t < kTokens; t++) {
        Vec x = E::load(k + t * job.dim + d);
        range = {S::min(range.low, x), S::max(range.high, x)};
        seen = watch(seen, x);
      }
      Affine affine;
      if (job.narrowed > 0) {
        fitted(job, k + d, range, top, affine);
      } else {
        ends(range, top, affine);
      }
      for (int i = 0; i < kLanes; i++) {
        scales[d + i] = narrow(affine.scale[i]);
        scales[job.dim + d + i] = narrow(affine.least[i]);
        whole &= finite(narrow(affine.scale[i] + affine.least[i]));
      }
      const Vec least = S::load(affine.least), scale = S::load(affine.scale);
      for (int64_t t = job.begin; t < kTokens; t++)
        put_codes(codes + t * job.dim + d,
                  coded(E::load(k + t * job.dim + d), least, scale, S::set(top)));
    }
    return whole && is_finite(seen);
  }

  // Codes [64][dim] as [64/16][dim/4F][16] words: a word is 4F channels of a token.
  template <int kBits>
  static void pack_keys(const uint8_t* codes, int64_t dim, uint8_t* tile) {
    constexpr int kFields = 8 / kBits;
    const int64_t words = dim / (4 * kFields);
    for (int64_t t = 0; t < kTokens; t++) {
      const uint8_t* row = codes + t * dim;
      for (int64_t j = 0; j < words; j++) {
        uint32_t fours[kFields], word = 0;
        std::memcpy(fours, row + j * sizeof(fours), sizeof(fours));
        for (int i = 0; i < kFields; i++) word |= fours[i] << kBits * i;
        std::memcpy(tile + ((t / 16 * words + j) * 16 + t % 16) * 4, &word, 4);
      }
    }
  }

  // ---- values: a scale for each token and partition

  // Write a partition's scales and least values; false where a token isn't finite.
  static bool value_scales(const EncodeJob& job, const T* v, uint16_t* scales, uint16_t* leasts) {
    const float top = static_cast<float>((1 << job.v_bits) - 1);
    float low[kTokens] = {}, high[kTokens] = {};
    Vec seen = S::zero();
    for (int64_t t = job.begin; t < kTokens; t++) {
      const T* x = v + t * job.dim;
      Range range{E::load(x), E::load(x)};
      for (int64_t i = 0; i < job.partition; i += kLanes) {
        range = {S::min(range.low, E::load(x + i)), S::max(range.high, E::load(x + i))};
        seen = watch(seen, E::load(x + i));
      }
      low[t] = S::smallest(range.low);
      high[t] = S::largest(range.high);
    }
    uint16_t scale[kTokens], least[kTokens];
    uint32_t infinite = 0;
    for (int t = 0; t < kTokens; t++) {
      least[t] = narrow(low[t] + 0.0f);
      scale[t] = narrow(usable(stored((high[t] - widen(least[t])) / top)));
      infinite |= finite(narrow(widen(scale[t]) + widen(least[t]))) ? 0 : 1;
    }
    std::memcpy(scales + job.begin, scale + job.begin, (kTokens - job.begin) * sizeof(uint16_t));
    std::memcpy(leasts + job.begin, least + job.begin, (kTokens - job.begin) * sizeof(uint16_t));
    return !infinite && is_finite(seen);
  }

  // Write codes as [64/4F][dim] words: a word is 4F tokens of a channel.
  template <int kBits>
  static void value_codes(const EncodeJob& job, const T* v, const uint16_t* scales,
                          const uint16_t* leasts, uint8_t* to) {
    constexpr int kRows = 32 / kBits;
    const Vec top = S::set(static_cast<float>((1 << kBits) - 1));
    for (int r = 0; r < kTokens; r += kRows) {
      for (int64_t i = 0; i < job.partition; i += kLanes) {
        Words words{};
        for (int row = 0; row < kRows; row++) {
          const int t = r + row;
          if (t < job.begin) continue;
          Vec code = coded(E::load(v + t * job.dim + i), S::set(widen(leasts[t])),
                           S::set(widen(scales[t])), top);
          words |= integers(code) << (row % 4 * 8 + row / 4 * kBits);
        }
        std::memcpy(to + (r / kRows * job.dim + i) * 4, &words, sizeof(words));
      }
    }
  }

  static bool values(const EncodeJob& job, const T* v, uint8_t* tile) {
    auto* scales = reinterpret_cast<uint16_t*>(tile + job.v_scale);
    auto* leasts = scales + job.dim / job.partition * kTokens;
    bool whole = true;
    for (int64_t d = 0; d < job.dim; d += job.partition, scales += kTokens, leasts += kTokens) {
      whole &= value_scales(job, v + d, scales, leasts);
      uint8_t* to = tile + job.v_codes + 4 * d;
      if (job.v_bits == 2) {
        value_codes<2>(job, v + d, scales, leasts, to);
      } else if (job.v_bits == 4) {
        value_codes<4>(job, v + d, scales, leasts, to);
      } else {
        value_codes<8>(job, v + d, scales, leasts, to);
      }
    }
    return whole;
  }

  // ---- a tile

  // Write rows as bfloat16; false where a value isn't finite there.
  static bool sinks(const T* x, int64_t count, uint16_t* to) {
    bool whole = true;
    for (int64_t i = 0; i < count; i++) {
      if constexpr (sizeof(T) == 2) {
        to[i] = x[i];
      } else {
        to[i] = narrow(x[i]);
      }
      whole &= finite(to[i]);
    }
    return whole;
  }

  static uint8_t encode(const EncodeJob& job, const T* k, const T* v, uint8_t* tile,
                        uint8_t* codes) {
    std::memset(tile + job.v_scale, 0, job.end - job.v_scale);
    std::memset(codes, 0, job.begin * job.dim);
    uint8_t refused = keys(job, k, tile, codes) ? 0 : kRefusedKeys;
    if (job.k_bits == 2) {
      pack_keys<2>(codes, job.dim, tile);
    } else if (job.k_bits == 4) {
      pack_keys<4>(codes, job.dim, tile);
    } else {
      pack_keys<8>(codes, job.dim, tile);
    }
    if (!values(job, v, tile)) refused |= kRefusedValues;
    if (job.begin == 0) return refused;
    const int64_t count = job.begin * job.dim;
    auto* area = reinterpret_cast<uint16_t*>(tile + job.sinks);
    if (!sinks(k, count, area)) refused |= kRefusedKeySinks;
    if (!sinks(v, count, area + count)) refused |= kRefusedValueSinks;
    return refused;
  }
};

template <class S>
constexpr EncodeKernels encode_kernels_of() {
  return {&EncodeTile<S, F32Elements<S>>::encode, &EncodeTile<S, Bf16Elements<S>>::encode};
}

}  // namespace kvkeep
