// What each instruction set provides to the linear layer: plain types only, so that this header is
// safe to compile with any instruction-set flags.
#pragma once

#include <cstdint>

namespace kvkeep {

// One column block against consecutive rows.
struct BlockJob {
  const uint8_t* weights;
  const uint32_t* x;  // 4-byte units: a float32, or a pair of bf16
  int64_t x_stride;   // in units
  int64_t units;
  int64_t rows;
  int64_t lanes;        // valid outputs of the block
  const float* scales;  // [block lanes] or null
  const void* bias;     // in the dtype of the outputs, or null
  void* out;
  int64_t out_stride;  // in elements
  bool out_bf16;
  float* spill;      // [rows][block lanes]
  uint8_t* decoded;  // one chunk of decoded weights
};

// How one instruction set lays out and applies weights.
struct LinearKernels {
  int block_lanes;
  int64_t chunk_bytes;  // of decoded weights
  bool bf16_pairs;  // bf16 activations are used as pairs; else they are widened to float32 first
  void (*f32)(const BlockJob&);
  void (*bf16)(const BlockJob&);
  void (*int8_f32)(const BlockJob&);
  void (*int8_bf16)(const BlockJob&);
};

const LinearKernels& linear_kernels_portable();
const LinearKernels& linear_kernels_avx2();
const LinearKernels& linear_kernels_avx512();

}  // namespace kvkeep
