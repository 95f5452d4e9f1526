// Row kernels each instruction set provides: plain types only.
#pragma once

#include <cstdint>

namespace kvkeep {

struct LeafKernels {
  // out[i] = x[i] / sqrt(mean(x^2) + eps), rounded to the dtype, times weight[i].
  void (*rms_norm_f32)(const float* x, const float* weight, float* out, int64_t dim, float eps);
  void (*rms_norm_bf16)(const uint16_t* x, const uint16_t* weight, uint16_t* out, int64_t dim,
                        float eps);
  // out[i] = silu(gate[i]) * up[i]; in bf16 each of the two results is rounded.
  void (*silu_mul_f32)(const float* gate, const float* up, float* out, int64_t count);
  void (*silu_mul_bf16)(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t count);
  // Rotate one head in place, halves paired; in bf16 both products are rounded before their sum.
  void (*rotate_f32)(float* x, const float* cos, const float* sin, int64_t dim);
  void (*rotate_bf16)(uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t dim);
};

const LeafKernels& leaf_kernels_portable();
const LeafKernels& leaf_kernels_avx2();
const LeafKernels& leaf_kernels_avx512();

}  // namespace kvkeep
