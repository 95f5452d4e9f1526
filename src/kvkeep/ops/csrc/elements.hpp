// The dtypes of activations and logits, as the row kernels read and write them.
#pragma once

#include <cstdint>

namespace kvkeep {

// Access to one dtype's elements as float32 vectors; `S::kLanes` at a time.
template <class S>
struct F32Elements {
  using T = float;
  static typename S::Vec load(const T* p) { return S::load(p); }
  static void store(T* p, typename S::Vec v) { S::store(p, v); }
  static typename S::Vec round(typename S::Vec v) { return v; }
};

template <class S>
struct Bf16Elements {
  using T = uint16_t;
  static typename S::Vec load(const T* p) { return S::load_bf16(p); }
  static void store(T* p, typename S::Vec v) { S::store_bf16(p, v); }
  static typename S::Vec round(typename S::Vec v) { return S::round_bf16(v); }
};

}  // namespace kvkeep
