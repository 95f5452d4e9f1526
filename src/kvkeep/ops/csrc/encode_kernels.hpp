// Kernels that code one tile, of each instruction set: plain types only.
#pragma once

#include <cstdint>

namespace kvkeep {

// What a tile holds that isn't finite, or is not once it is rounded to what is stored.
inline constexpr uint8_t kRefusedKeys = 1, kRefusedValues = 2, kRefusedKeySinks = 4,
                         kRefusedValueSinks = 8;

struct EncodeJob {
  int64_t dim, partition;  // channels of a row, of a partition
  int64_t begin;           // first token that is coded: those before are sinks
  int k_bits, v_bits;
  float narrowed, margin;  // of a range that keys are fitted from; 0: not fitted
  int64_t k_scale, v_codes, v_scale, sinks, end;  // parts of a tile, as offsets in bytes
};

// Code k, v [64][dim] into `tile`; `codes` is scratch for a byte per key. Returns what is refused.
struct EncodeKernels {
  uint8_t (*f32)(const EncodeJob& job, const float* k, const float* v, uint8_t* tile,
                 uint8_t* codes);
  uint8_t (*bf16)(const EncodeJob& job, const uint16_t* k, const uint16_t* v, uint8_t* tile,
                  uint8_t* codes);
};

const EncodeKernels& encode_kernels_portable();
const EncodeKernels& encode_kernels_avx2();
const EncodeKernels& encode_kernels_avx512();

}  // namespace kvkeep
