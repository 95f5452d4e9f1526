// Vectors of AVX-512 with BF16: sixteen float32 lanes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kvkeep {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;

  // Linear: 6 rows x 64 outputs fill 24 of 32 registers.
  static constexpr int kBlockVecs = 4;
  static constexpr int kMaxRows = 6;
  static constexpr int kChunkUnits = 64;
  static constexpr int kAheadBytes = 8192;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  // Of min and max, b where either is not a number.
  static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static float smallest(Vec a) {
    __m256 b = _mm256_min_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_min_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_min_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_min_ss(c, _mm_movehdup_ps(c)));
  }
  static float largest(Vec a) {
    __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
  }
  // a where it is above (from: not below) b, else 0.
  static Vec keep_above(Vec a, Vec b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), a);
  }
  static Vec keep_from(Vec a, Vec b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), a);
  }
  static Vec round(Vec a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // a with the lowest bits of n added to its exponent: a * 2^n for n + 1.5 * 2^23.
  static Vec add_exponent(Vec a, Vec n) {
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), exponent));
  }
  // a * 2^n for integral n.
  static Vec scale(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }

  static Vec load_bf16(const uint16_t* p) {
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static void store_bf16(uint16_t* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
  static Vec round_bf16(Vec v) {
    __m256i raw = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }

  struct F32 {
    using Native = F32;
    using Operand = __m512;
    static constexpr int kUnitBytes = 256;
    static Operand load(const uint8_t* w, int v) { return _mm512_loadu_ps(w + 64 * v); }
    static void put(uint8_t* to, int v, Operand w) { _mm512_storeu_ps(to + 64 * v, w); }
    static __m512 broadcast(const uint32_t* x) {
      return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*x)));
    }
    static Vec madd(Vec acc, Operand w, __m512 x) { return _mm512_fmadd_ps(w, x, acc); }
  };

  struct Bf16 {
    using Native = Bf16;
    using Operand = __m512bh;
    static constexpr int kUnitBytes = 256;
    static Operand load(const uint8_t* w, int v) {
      return reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + 64 * v));
    }
    static void put(uint8_t* to, int v, Operand w) {
      _mm512_storeu_si512(to + 64 * v, reinterpret_cast<__m512i>(w));
    }
    static __m512bh broadcast(const uint32_t* x) {
      return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(*x)));
    }
    static Vec madd(Vec acc, Operand w, __m512bh x) { return _mm512_dpbf16_ps(acc, w, x); }
  };

  static __m512 int8_lanes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  struct Int8F32 {
    using Native = F32;
    using Operand = F32::Operand;
    static constexpr int kUnitBytes = 64;
    static Operand load(const uint8_t* w, int v) { return int8_lanes(w + 16 * v); }
    static __m512 broadcast(const uint32_t* x) { return F32::broadcast(x); }
    static Vec madd(Vec acc, Operand w, __m512 x) { return F32::madd(acc, w, x); }
  };

  struct Int8Bf16 {  // integers up to 127 are exact in bf16
    using Native = Bf16;
    using Operand = Bf16::Operand;
    static constexpr int kUnitBytes = 128;
    static Operand load(const uint8_t* w, int v) {
      return _mm512_cvtne2ps_pbh(int8_lanes(w + 32 * v + 16), int8_lanes(w + 32 * v));
    }
    static __m512bh broadcast(const uint32_t* x) { return Bf16::broadcast(x); }
    static Vec madd(Vec acc, Operand w, __m512bh x) { return Bf16::madd(acc, w, x); }
  };
};

}  // namespace kvkeep
