// Attention on AVX-512 with BF16 dot products.
#include <immintrin.h>

#include "attention_job.hpp"

namespace kvkeep::attention::avx512 {
namespace {

struct Isa {
  using V = __m512;
  static constexpr int kWidth = 16, kRows = 6, kCols = 4;

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
};

#include "attention_kernels.inl"

struct F32 {
  using A = float;
  using B = float;
  using Loaded = V;
  static constexpr int kPair = 1;

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
