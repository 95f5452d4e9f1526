// Vectors of AVX2 with FMA: eight float32 lanes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace kvkeep {

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;

  // Linear: 6 rows x 16 outputs fill 12 of 16 registers.
  static constexpr int kBlockVecs = 2;
  static constexpr int kMaxRows = 6;
  static constexpr int kChunkUnits = 256;
  static constexpr int kAheadBytes = 2048;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // Of min and max, b where either is not a number.
  static Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static float smallest(Vec a) {
    __m128 b = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_min_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_min_ss(b, _mm_movehdup_ps(b)));
  }
  static float largest(Vec a) {
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
  }
  // a where it is above (from: not below) b, else 0.
  static Vec keep_above(Vec a, Vec b) { return _mm256_and_ps(a, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  static Vec keep_from(Vec a, Vec b) { return _mm256_and_ps(a, _mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
  static Vec round(Vec a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // a with the lowest bits of n added to its exponent: a * 2^n for n + 1.5 * 2^23.
  static Vec add_exponent(Vec a, Vec n) {
    __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
  }
  // a * 2^n for integral n in [-126, 127].
  static Vec scale(Vec a, Vec n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }

  static Vec load_bf16(const uint16_t* p) {
    __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  // Nearest, ties to even; a NaN stays a quiet NaN.
  static __m256i bf16_bits(Vec v) {
    __m256i raw = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(raw, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(raw, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  }
  static void store_bf16(uint16_t* p, Vec v) {
    __m256i bits = bf16_bits(v);
    __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static Vec round_bf16(Vec v) { return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(v), 16)); }

  struct F32 {
    using Native = F32;
    using Operand = __m256;
    static constexpr int kUnitBytes = 64;
    static Operand load(const uint8_t* w, int v) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(w) + 8 * v);
    }
    static void put(uint8_t* to, int v, Operand w) {
      _mm256_storeu_ps(reinterpret_cast<float*>(to) + 8 * v, w);
    }
    static __m256 broadcast(const uint32_t* x) {
      return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(*x)));
    }
    static Vec madd(Vec acc, Operand w, __m256 x) { return _mm256_fmadd_ps(w, x, acc); }
  };

  struct Bf16 : F32 {
    static constexpr int kUnitBytes = 32;
    static Operand load(const uint8_t* w, int v) {
      return load_bf16(reinterpret_cast<const uint16_t*>(w) + 8 * v);
    }
  };

  struct Int8 : F32 {
    static constexpr int kUnitBytes = 16;
    static Operand load(const uint8_t* w, int v) {
      __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + 8 * v));
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
    }
  };
};

}  // namespace kvkeep
