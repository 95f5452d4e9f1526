// Sampling kernels each instruction set provides: plain types only.
#pragma once

#include <cstdint>

namespace kvkeep {

constexpr int64_t kBlock = 512;  // ids whose weights are summed together

struct Largest {
  float value;  // not a number where any element is +inf or not a number
  int64_t id;   // the first of equals
};

// The weight of a logit x is w = 2^max((x - top) * scale, -120), exactly 1 at `top`. It is kept if
// w > bound, or if w == bound and its id is below `ties`; else it counts as 0.
struct Weighing {
  float top, scale, bound;
  int64_t ties;
};

struct SampleKernels {
  Largest (*largest_f32)(const float* x, int64_t count);
  Largest (*largest_bf16)(const uint16_t* x, int64_t count);
  // The kept weights of one block of a row of `count` logits; 0 beyond its end.
  void (*block_weights_f32)(const float* x, int64_t count, const Weighing& how, int64_t block,
                            float* weights);
  void (*block_weights_bf16)(const uint16_t* x, int64_t count, const Weighing& how, int64_t block,
                             float* weights);
  // sums[b] = the sum of block b's kept weights, for b from `first` to before `last`.
  void (*block_sums_f32)(const float* x, int64_t count, const Weighing& how, int64_t first,
                         int64_t last, float* sums);
  void (*block_sums_bf16)(const uint16_t* x, int64_t count, const Weighing& how, int64_t first,
                          int64_t last, float* sums);
};

const SampleKernels& sample_kernels_portable();
const SampleKernels& sample_kernels_avx2();
const SampleKernels& sample_kernels_avx512();

}  // namespace kvkeep
