// Vectors of any CPU: four float32 lanes in the compiler's own vector type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace kvkeep {

struct Portable {
  using Vec = float __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;

  // Linear: 2 rows x 16 outputs fill 8 of 16 registers.
  static constexpr int kBlockVecs = 4;
  static constexpr int kMaxRows = 2;
  static constexpr int kChunkUnits = 256;
  static constexpr int kAheadBytes = 2048;

  static Vec zero() { return Vec{}; }
  static Vec set(float x) { return Vec{x, x, x, x}; }
  static Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec sub(Vec a, Vec b) { return a - b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec div(Vec a, Vec b) { return a / b; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  // Of min and max, b where either is not a number.
  static Vec min(Vec a, Vec b) { return a < b ? a : b; }
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static float smallest(Vec a) {
    const float b = a[0] < a[1] ? a[0] : a[1], c = a[2] < a[3] ? a[2] : a[3];
    return b < c ? b : c;
  }
  static float largest(Vec a) {
    const float b = a[0] > a[1] ? a[0] : a[1], c = a[2] > a[3] ? a[2] : a[3];
    return b > c ? b : c;
  }
  // a where it is above (from: not below) b, else 0.
  static Vec keep_above(Vec a, Vec b) { return a > b ? a : zero(); }
  static Vec keep_from(Vec a, Vec b) { return a >= b ? a : zero(); }
  static Vec round(Vec a) {
    for (int i = 0; i < kLanes; i++) a[i] = std::nearbyint(a[i]);
    return a;
  }
  // a with the lowest bits of n added to its exponent: a * 2^n for n + 1.5 * 2^23.
  static Vec add_exponent(Vec a, Vec n) {
    using Bits = uint32_t __attribute__((vector_size(16)));
    return reinterpret_cast<Vec>(reinterpret_cast<Bits>(a) + (reinterpret_cast<Bits>(n) << 23));
  }
  // a * 2^n for integral n in [-126, 127].
  static Vec scale(Vec a, Vec n) {
    for (int i = 0; i < kLanes; i++) {
      uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n[i]) + 127) << 23;
      float power;
      std::memcpy(&power, &bits, sizeof(power));
      a[i] *= power;
    }
    return a;
  }

  static float widen(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof(y));
    return y;
  }
  // Nearest, ties to even; a NaN stays a quiet NaN.
  static uint16_t narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    if (x != x) return static_cast<uint16_t>((bits | 0x400000u) >> 16);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
  static Vec load_bf16(const uint16_t* p) {
    return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
  }
  static void store_bf16(uint16_t* p, Vec v) {
    for (int i = 0; i < kLanes; i++) p[i] = narrow(v[i]);
  }
  static Vec round_bf16(Vec v) {
    for (int i = 0; i < kLanes; i++) v[i] = widen(narrow(v[i]));
    return v;
  }

  struct F32 {
    using Native = F32;
    using Operand = Vec;
    static constexpr int kUnitBytes = 64;
    static Operand load(const uint8_t* w, int v) {
      return Portable::load(reinterpret_cast<const float*>(w) + 4 * v);
    }
    static void put(uint8_t* to, int v, Operand w) {
      store(reinterpret_cast<float*>(to) + 4 * v, w);
    }
    static Vec broadcast(const uint32_t* x) {
      float y;
      std::memcpy(&y, x, sizeof(y));
      return set(y);
    }
    static Vec madd(Vec acc, Operand w, Vec x) { return acc + w * x; }
  };

  struct Bf16 : F32 {
    static constexpr int kUnitBytes = 32;
    static Operand load(const uint8_t* w, int v) {
      return load_bf16(reinterpret_cast<const uint16_t*>(w) + 4 * v);
    }
  };

  struct Int8 : F32 {
    static constexpr int kUnitBytes = 16;
    static Operand load(const uint8_t* w, int v) {
      auto* q = reinterpret_cast<const int8_t*>(w) + 4 * v;
      return Vec{static_cast<float>(q[0]), static_cast<float>(q[1]), static_cast<float>(q[2]),
                 static_cast<float>(q[3])};
    }
  };
};

}  // namespace kvkeep
