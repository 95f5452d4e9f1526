// Kernels that turn one head's row, of each instruction set: plain types only.
#pragma once

#include <cstdint>

namespace kvkeep {

// `scratch` holds 2 * dim floats; `dim` is a multiple of 16.
template <class T>
struct TurnRowKernels {
  void (*order)(const T* x, const int32_t* order, T* out, int64_t dim);
  void (*butterfly)(const T* x, const int32_t* order, const float* factor, T* out, int64_t dim,
                    float* scratch);
  void (*matrix)(const T* x, const float* matrix, T* out, int64_t dim, float* scratch);
};

struct TurnKernels {
  TurnRowKernels<float> f32;
  TurnRowKernels<uint16_t> bf16;
};

const TurnKernels& turn_kernels_portable();
const TurnKernels& turn_kernels_avx2();
const TurnKernels& turn_kernels_avx512();

}  // namespace kvkeep
