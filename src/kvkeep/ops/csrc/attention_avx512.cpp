// Attention on AVX-512 with BF16 dot products.
#include <immintrin.h>

#include "attention_job.hpp"

namespace kvkeep::attention::avx512 {
namespace {

struct Isa {
  using V = __m512;
  using I = __m512i;
  static constexpr int kWidth = 16, kRows = 6, kCols = 4, kCodeRows = 8;
  static constexpr int code_cols(int rows) { return rows <= 4 ? 4 : 2; }

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V x) { _mm512_storeu_ps(p, x); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static float first(V x) { return _mm512_cvtss_f32(x); }
  static float reduce_max(V x) { return _mm512_reduce_max_ps(x); }
  static float reduce_add(V x) { return _mm512_reduce_add_ps(x); }

  // Lanes whose bit is set from x, -inf elsewhere.
  static V keep(uint64_t bits, V x) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), set1(-__builtin_inff()), x);
  }

  // Which lanes are at least `least`, a bit each; what is not a number is not.
  static uint32_t from(V x, V least) { return _mm512_cmp_ps_mask(x, least, _CMP_GE_OQ); }
  // The lanes of x whose bit is set, side by side; what lies in p behind them is lost.
  static void pack(float* p, uint32_t bits, V x) {
    store(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), x));
  }
  // The lowest bits of x, each where `places` has one of its own.
  static uint64_t spread(uint64_t x, uint64_t places) { return _pdep_u64(x, places); }

  // 2^x for x <= 0; -inf gives 0, by scalef's rule for a NaN times 2^-inf. Relative error 1e-7;
  // derived, minimax over
  // [-1/2, 1/2] with 2^0 = 1 exactly.
  static V exp2(V x) {
    V whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    V rest = sub(x, whole);
    V y = set1(1.326474252e-03f);
    y = fma(y, rest, set1(9.671517999e-03f));
    y = fma(y, rest, set1(5.550733756e-02f));
    y = fma(y, rest, set1(2.402224200e-01f));
    y = fma(y, rest, set1(6.931469776e-01f));
    y = fma(y, rest, set1(1.0f));
    return _mm512_scalef_ps(y, whole);
  }

  static V abs(V x) { return _mm512_abs_ps(x); }
  static V half(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }

  // What four vectors reduce to, each in the lanes of a quarter; the order of sums is the same for
  // all four.
  template <class Op>
  static V reduce4(V a, V b, V c, V d, Op op) {
    const V ab = op(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const V cd = op(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    V x = op(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    x = op(x, _mm512_permute_ps(x, 0x4e));
    return op(x, _mm512_permute_ps(x, 0xb1));
  }
  static V max4(V a, V b, V c, V d) { return reduce4(a, b, c, d, &max); }
  static V add4(V a, V b, V c, V d) { return reduce4(a, b, c, d, &add); }
  static void store4(float* p, V x) {
    const __m512i quarter = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    _mm_storeu_ps(p, _mm512_castps512_ps128(_mm512_permutexvar_ps(quarter, x)));
  }
  template <int kQuarter>
  static V lane(V x) {
    return _mm512_shuffle_f32x4(x, x, 0x55 * kQuarter);
  }
  // top / x; 0 where x is below 2^-100.
  static V over(float top, V x) {
    const __mmask16 usable = _mm512_cmp_ps_mask(x, set1(0x1p-100f), _CMP_GE_OQ);
    return _mm512_maskz_div_ps(usable, set1(top), x);
  }

  // kVecs vectors rounded to bytes, to even.
  template <int kVecs, bool kSigned>
  static void store_bytes(uint8_t* p, const V (&x)[kVecs]) {
    if constexpr (kVecs == 4) {
      const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(x[0]), _mm512_cvtps_epi32(x[1]));
      const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2]), _mm512_cvtps_epi32(x[3]));
      const __m512i bytes =
          kSigned ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
      const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
      _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
    } else {
      for (int k = 0; k < kVecs; k++)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 * k),
                         _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x[k])));
    }
  }

  static I none() { return _mm512_setzero_si512(); }
  static I all(int x) { return _mm512_set1_epi32(x); }
  static I bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I quad(const uint8_t* p) {
    int four;
    __builtin_memcpy(&four, p, sizeof(four));
    return _mm512_set1_epi32(four);
  }
  template <int kBits>
  static I shift(I x) {
    return kBits ? _mm512_srli_epi16(x, kBits) : x;
  }
  static I mask(I x, int byte) { return _mm512_and_si512(x, _mm512_set1_epi8(byte)); }
  template <int kBits>
  static I shift_lanes(I x) {
    return kBits ? _mm512_srli_epi32(x, kBits) : x;
  }
  static I all_and(I x, int lanes) { return _mm512_and_si512(x, all(lanes)); }
  static I flip(I x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
  // Products of four unsigned with four signed bytes; kAny: the signed ones are not small.
  template <bool kAny>
  static I dot(I acc, I a, I b) {
    return _mm512_dpbusd_epi32(acc, a, b);
  }
  static V to_float(I x) { return _mm512_cvtepi32_ps(x); }
};

#include "attention_kernels.inl"

struct F32 {
  using A = float;
  using B = float;
  using Loaded = V;
  static constexpr int kPair = 1;
  static constexpr bool kLooksUp = false;

  static V load(const B* p) { return Isa::load(p); }
  static V load_first(const B* p) { return Isa::load(p); }
  static V broadcast(const A* p) { return Isa::set1(*p); }
  static V dot(V acc, V a, V b) { return Isa::fma(a, b, acc); }
  static void store_weights(A* p, V low, V high) {
    Isa::store(p, low);
    Isa::store(p + W, high);
  }
  static void store_out(B* p, V x) { Isa::store(p, x); }
  static void gather(A* to, const B* from, int dim) { __builtin_memcpy(to, from, sizeof(A) * dim); }
  static void widen(float* to, const B* from, int dim) { gather(to, from, dim); }
};

struct Bf16 {
  using A = uint16_t;
  using B = uint16_t;
  using Loaded = __m512bh;
  static constexpr int kPair = 2;
  static constexpr bool kLooksUp = true;

  // What codes stand for, [count][2^kBits]: scale * code + low.
  template <int kBits>
  static void fill_table(B* to, const float* scale, const float* low, int count) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i which = _mm512_srli_epi32(lane, kBits);
    const V code = _mm512_cvtepi32_ps(_mm512_and_si512(lane, _mm512_set1_epi32((1 << kBits) - 1)));
    for (int i = 0; i < count; i += 16 >> kBits) {
      const V s = _mm512_permutexvar_ps(which, Isa::load(scale + i));
      const V m = _mm512_permutexvar_ps(which, Isa::load(low + i));
      store_out(to + (i << kBits), Isa::fma(code, s, m));
    }
  }

  // The values of a line of codes, sixteen lanes of two neighbours along the sum at a time, each
  // such pair `stride` values from the one before; the table is that of the line's first.
  template <int kBits>
  static void look_up(const uint8_t* line, const B* table, B* to, int64_t stride) {
    constexpr int kLevels = 1 << kBits;
    const __m512i raw = _mm512_loadu_si512(line);
    const auto pair = [&]<int kField, int kHalf>(__m512i bytes) {
      constexpr int kAlong = 4 * kField + 2 * kHalf, kFirst = kAlong * kLevels % 32;
      const __m512i index = _mm512_ternarylogic_epi32(
          _mm512_srli_epi16(bytes, kBits * kField), _mm512_set1_epi16(kLevels - 1),
          _mm512_set1_epi32(kFirst | (kFirst + kLevels) << 16), 0xea);  // (a & b) | c
      const __m512i held = _mm512_loadu_si512(table + kAlong * kLevels / 32 * 32);
      _mm512_storeu_si512(to + kAlong / 2 * stride, _mm512_permutexvar_epi16(index, held));
    };
    const auto half = [&]<int kHalf>() {
      constexpr char a = 2 * kHalf, b = 2 * kHalf + 1, none = -1;
      const __m128i order = _mm_set_epi8(none, 12 + b, none, 12 + a, none, 8 + b, none, 8 + a, none,
                                         4 + b, none, 4 + a, none, b, none, a);
      const __m512i bytes = _mm512_shuffle_epi8(raw, _mm512_broadcast_i32x4(order));
      pair.template operator()<0, kHalf>(bytes);
      pair.template operator()<1, kHalf>(bytes);
      if constexpr (kBits == 2) pair.template operator()<2, kHalf>(bytes);
      if constexpr (kBits == 2) pair.template operator()<3, kHalf>(bytes);
    };
    half.template operator()<0>();
    half.template operator()<1>();
  }

  static __m512bh load(const B* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh load_first(const B* p) {
    return (__m512bh)_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0xffff));
  }
  static __m512bh broadcast(const A* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static V dot(V acc, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(acc, a, b); }
  static void store_weights(A* p, V low, V high) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  static void store_out(B* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static void gather(A* to, const B* from, int dim) { __builtin_memcpy(to, from, sizeof(A) * dim); }
  static void widen(float* to, const B* from, int dim) {
    for (int d = 0; d < dim; d += W) {
      __m512i half =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + d)));
      Isa::store(to + d, _mm512_castsi512_ps(_mm512_slli_epi32(half, 16)));
    }
  }
};

}  // namespace

const Kernels kKernels[kLayouts] = {table<F32>(), table<Bf16>()};

}  // namespace kvkeep::attention::avx512
