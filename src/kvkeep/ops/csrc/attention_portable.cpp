// Attention in plain C++ over vectors of four floats, which every compiler turns into what the
// machine has.
#include "attention_job.hpp"

namespace kvkeep::attention::portable {
namespace {

struct Isa {
  typedef float V __attribute__((vector_size(16)));
  typedef int32_t Bits __attribute__((vector_size(16)));
  using I = Bits;
  static constexpr int kWidth = 4, kRows = 2, kCols = 4, kCodeRows = 4;
  static constexpr int code_cols(int) { return 4; }

  static V zero() { return V{}; }
  static V set1(float x) { return V{x, x, x, x}; }
  static V load(const float* p) {
    V x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  }
  static void store(float* p, V x) { __builtin_memcpy(p, &x, sizeof(x)); }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }
  static float first(V x) { return x[0]; }
  static float reduce_max(V x) {
    const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
  }
  static float reduce_add(V x) { return (x[0] + x[1]) + (x[2] + x[3]); }

  // Lanes whose bit is set from x, -inf elsewhere.
  static V keep(uint64_t bits, V x) {
    const Bits lane{1, 2, 4, 8};
    const int32_t low = static_cast<int32_t>(bits & 15);
    return (Bits{low, low, low, low} & lane) == lane ? x : set1(-__builtin_inff());
  }

  // Which lanes are at least `least`, a bit each; what is not a number is not.
  static uint32_t from(V x, V least) {
    const Bits found = (x >= least) & Bits{1, 2, 4, 8};
    return static_cast<uint32_t>(found[0] | found[1] | found[2] | found[3]);
  }
  // The lanes of x whose bit is set, side by side.
  static void pack(float* p, uint32_t bits, V x) {
    for (; bits; bits &= bits - 1) *p++ = x[__builtin_ctz(bits)];
  }
  // The lowest bits of x, each where `places` has one of its own.
  static uint64_t spread(uint64_t x, uint64_t places) {
    uint64_t found = 0;
    for (; x; x >>= 1, places &= places - 1) found |= x & 1 ? places & -places : 0;
    return found;
  }

  // 2^x for x <= 0; 0 below -126.5. Relative error 1e-7; derived, minimax over [-1/2, 1/2] with 2^0
  // = 1 exactly. What is not a number stays so.
  static V exp2(V x) {
    x = max(set1(-127.0f), x);
    const V shift = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    V whole = (x + shift) - shift;
    V rest = x - whole;
    V y = set1(1.326474252e-03f);
    y = fma(y, rest, set1(9.671517999e-03f));
    y = fma(y, rest, set1(5.550733756e-02f));
    y = fma(y, rest, set1(2.402224200e-01f));
    y = fma(y, rest, set1(6.931469776e-01f));
    y = fma(y, rest, set1(1.0f));
    return y * (V)((__builtin_convertvector(whole, Bits) + 127) << 23);
  }

  static V abs(V x) { return (V)((Bits)x & 0x7fffffff); }
  static V half(const uint16_t* p) {
    return (V)Bits{p[0] << 16, p[1] << 16, p[2] << 16, p[3] << 16};
  }

  // What four vectors reduce to, a lane each.
  static V max4(V a, V b, V c, V d) {
    return V{reduce_max(a), reduce_max(b), reduce_max(c), reduce_max(d)};
  }
  static V add4(V a, V b, V c, V d) {
    return V{reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d)};
  }
  static void store4(float* p, V x) { store(p, x); }
  template <int kQuarter>
  static V lane(V x) {
    return set1(x[kQuarter]);
  }
  // top / x; 0 where x is below 2^-100.
  static V over(float top, V x) { return x >= set1(0x1p-100f) ? set1(top) / x : zero(); }

  // kVecs vectors rounded to bytes, to even.
  template <int kVecs, bool kSigned>
  static void store_bytes(uint8_t* p, const V (&x)[kVecs]) {
    const V shift = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    for (int k = 0; k < kVecs; k++) {
      const Bits whole = __builtin_convertvector((x[k] + shift) - shift, Bits);
      for (int i = 0; i < kWidth; i++) p[k * kWidth + i] = static_cast<uint8_t>(whole[i]);
    }
  }

  static I none() { return I{}; }
  static I all(int x) { return I{x, x, x, x}; }
  static I bytes(const uint8_t* p) {
    I x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  }
  static I quad(const uint8_t* p) {
    int four;
    __builtin_memcpy(&four, p, sizeof(four));
    return all(four);
  }
  // Within 32 bits: masked afterwards.
  template <int kBits>
  static I shift(I x) {
    return x >> kBits;
  }
  static I mask(I x, int byte) { return x & static_cast<int>(0x01010101u * byte); }
  template <int kBits>
  static I shift_lanes(I x) {
    return x >> kBits;
  }
  static I all_and(I x, int lanes) { return x & lanes; }
  static I flip(I x) { return x ^ static_cast<int>(0x80808080u); }
  // Products of four unsigned with four signed bytes.
  template <bool kAny>
  static I dot(I acc, I a, I b) {
    for (int beta = 0; beta < 4; beta++)
      acc += (a >> 8 * beta & 255) * (b << (24 - 8 * beta) >> 24);
    return acc;
  }
  static V to_float(I x) { return __builtin_convertvector(x, V); }
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
    Isa::Bits pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return {(V)(pair << 16), (V)(pair & static_cast<int32_t>(0xffff0000))};
  }
  static Loaded load_first(const B* p) { return {load(p).even, Isa::zero()}; }
  static Factor broadcast(const A* p) { return {Isa::set1(p[0]), Isa::set1(p[1])}; }
  static V dot(V acc, Factor a, Loaded b) {
    return Isa::fma(a.odd, b.odd, Isa::fma(a.even, b.even, acc));
  }
  static void store_weights(A* p, V low, V high) {
    Isa::store(p, low);
    Isa::store(p + W, high);
  }
  static void store_out(B* p, V x) {
    for (int i = 0; i < W; i++) {
      uint32_t bits;
      float lane = x[i];
      __builtin_memcpy(&bits, &lane, sizeof(bits));
      p[i] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
  static void gather(A* to, const B* from, int dim) {
    for (int d = 0; d < dim; d++) {
      uint32_t bits = static_cast<uint32_t>(from[d]) << 16;
      __builtin_memcpy(to + d, &bits, sizeof(bits));
    }
  }
  static void widen(float* to, const B* from, int dim) { gather(to, from, dim); }
};

}  // namespace

const Kernels kKernels[kLayouts] = {table<F32>(), table<Bf16>()};

}  // namespace kvkeep::attention::portable
