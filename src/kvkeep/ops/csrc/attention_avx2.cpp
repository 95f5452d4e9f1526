// Attention on AVX2 with FMA; bf16 is widened to float32 in registers.
#include <immintrin.h>

#include "attention_job.hpp"

namespace kvkeep::attention::avx2 {
namespace {

struct Isa {
  using V = __m256;
  using I = __m256i;
  static constexpr int kWidth = 8, kRows = 6, kCols = 2, kCodeRows = 4;
  static constexpr int code_cols(int) { return 2; }

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V x) { _mm256_storeu_ps(p, x); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static float first(V x) { return _mm256_cvtss_f32(x); }
  static float reduce_max(V x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }
  static float reduce_add(V x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }

  // Lanes whose bit is set from x, -inf elsewhere.
  static V keep(uint64_t bits, V x) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 0xff)), lane);
    return _mm256_blendv_ps(set1(-__builtin_inff()), x,
                            _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
  }

  // Which lanes are at least `least`, a bit each; what is not a number is not.
  static uint32_t from(V x, V least) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, least, _CMP_GE_OQ)));
  }
  // The lanes of x whose bit is set, side by side.
  static void pack(float* p, uint32_t bits, V x) {
    alignas(32) float lane[kWidth];
    _mm256_store_ps(lane, x);
    for (; bits; bits &= bits - 1) *p++ = lane[__builtin_ctz(bits)];
  }
  // The lowest bits of x, each where `places` has one of its own.
  static uint64_t spread(uint64_t x, uint64_t places) { return _pdep_u64(x, places); }

  // 2^x for x <= 0; 0 below -126.5. Relative error 1e-7; derived, minimax over [-1/2, 1/2] with 2^0
  // = 1 exactly. What is not a number stays so.
  static V exp2(V x) {
    x = _mm256_max_ps(set1(-127.0f), x);
    V whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    V rest = sub(x, whole);
    V y = set1(1.326474252e-03f);
    y = fma(y, rest, set1(9.671517999e-03f));
    y = fma(y, rest, set1(5.550733756e-02f));
    y = fma(y, rest, set1(2.402224200e-01f));
    y = fma(y, rest, set1(6.931469776e-01f));
    y = fma(y, rest, set1(1.0f));
    __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return mul(y, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
  }

  static V abs(V x) { return _mm256_andnot_ps(set1(-0.0f), x); }
  static V half(const uint16_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }

  // What four vectors reduce to, each in two lanes side by side; the order of sums is the same for
  // all four.
  template <class Op>
  static V reduce4(V a, V b, V c, V d, Op op) {
    const V ac = op(_mm256_permute2f128_ps(a, c, 0x20), _mm256_permute2f128_ps(a, c, 0x31));
    const V bd = op(_mm256_permute2f128_ps(b, d, 0x20), _mm256_permute2f128_ps(b, d, 0x31));
    const V x = op(_mm256_shuffle_ps(ac, bd, 0x44), _mm256_shuffle_ps(ac, bd, 0xee));
    return op(x, _mm256_permute_ps(x, 0xb1));
  }
  static V max4(V a, V b, V c, V d) { return reduce4(a, b, c, d, &max); }
  static V add4(V a, V b, V c, V d) { return reduce4(a, b, c, d, &add); }
  static void store4(float* p, V x) {
    const __m256i pair = _mm256_setr_epi32(0, 2, 4, 6, 0, 0, 0, 0);
    _mm_storeu_ps(p, _mm256_castps256_ps128(_mm256_permutevar8x32_ps(x, pair)));
  }
  template <int kQuarter>
  static V lane(V x) {
    return _mm256_permutevar8x32_ps(x, _mm256_set1_epi32(2 * kQuarter));
  }
  // top / x; 0 where x is below 2^-100.
  static V over(float top, V x) {
    const V usable = _mm256_cmp_ps(x, set1(0x1p-100f), _CMP_GE_OQ);
    return _mm256_and_ps(usable, _mm256_div_ps(set1(top), x));
  }

  // kVecs vectors, an even number, rounded to bytes, to even.
  template <int kVecs, bool kSigned>
  static void store_bytes(uint8_t* p, const V (&x)[kVecs]) {
    for (int k = 0; k < kVecs; k += 2) {
      __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x[k]), _mm256_cvtps_epi32(x[k + 1]));
      words = _mm256_permute4x64_epi64(words, 0xd8);
      const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + k * kWidth),
                       kSigned ? _mm_packs_epi16(low, high) : _mm_packus_epi16(low, high));
    }
  }

  static I none() { return _mm256_setzero_si256(); }
  static I all(int x) { return _mm256_set1_epi32(x); }
  static I bytes(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static I quad(const uint8_t* p) {
    int four;
    __builtin_memcpy(&four, p, sizeof(four));
    return _mm256_set1_epi32(four);
  }
  template <int kBits>
  static I shift(I x) {
    return kBits ? _mm256_srli_epi16(x, kBits) : x;
  }
  static I mask(I x, int byte) {
    return _mm256_and_si256(x, _mm256_set1_epi8(static_cast<char>(byte)));
  }
  template <int kBits>
  static I shift_lanes(I x) {
    return kBits ? _mm256_srli_epi32(x, kBits) : x;
  }
  static I all_and(I x, int lanes) { return _mm256_and_si256(x, all(lanes)); }
  static I flip(I x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
  // Products of four unsigned with four signed bytes; kAny: their pairs' sums may need 17 bits, so
  // the unsigned ones are taken apart.
  template <bool kAny>
  static I dot(I acc, I a, I b) {
    const I ones = _mm256_set1_epi16(1);
    if constexpr (kAny) {
      const I top = _mm256_madd_epi16(_mm256_maddubs_epi16(mask(shift<7>(a), 1), b), ones);
      acc = _mm256_add_epi32(acc, _mm256_slli_epi32(top, 7));
      a = mask(a, 127);
    }
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
  }
  static V to_float(I x) { return _mm256_cvtepi32_ps(x); }
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
  static V broadcast(const A* p) { return _mm256_broadcast_ss(p); }
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
  using A = float;
  using B = uint16_t;
  struct Loaded {
    V even, odd;
  };
  struct Factor {
    V even, odd;
  };
  static constexpr int kPair = 2;
  static constexpr bool kLooksUp = false;

  static Loaded load(const B* p) {
    __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)),
            _mm256_castsi256_ps(
                _mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  static Loaded load_first(const B* p) { return {load(p).even, Isa::zero()}; }
  static Factor broadcast(const A* p) {
    return {_mm256_broadcast_ss(p), _mm256_broadcast_ss(p + 1)};
  }
  static V dot(V acc, Factor a, Loaded b) {
    return Isa::fma(a.odd, b.odd, Isa::fma(a.even, b.even, acc));
  }
  static void store_weights(A* p, V low, V high) {
    Isa::store(p, low);
    Isa::store(p + W, high);
  }
  static void store_out(B* p, V x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    bits = _mm256_srli_epi32(bits, 16);
    __m128i half =
        _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
  static void gather(A* to, const B* from, int dim) {
    for (int d = 0; d < dim; d += W) {
      __m256i half =
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + d)));
      Isa::store(to + d, _mm256_castsi256_ps(_mm256_slli_epi32(half, 16)));
    }
  }
  static void widen(float* to, const B* from, int dim) { gather(to, from, dim); }
};

}  // namespace

const Kernels kKernels[kLayouts] = {table<F32>(), table<Bf16>()};

}  // namespace kvkeep::attention::avx2
