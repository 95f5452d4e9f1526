#include "sample_row.hpp"
#include "simd_avx2.hpp"

namespace kvkeep {

const SampleKernels& sample_kernels_avx2() {
  static constexpr SampleKernels kernels = sample_kernels_of<Avx2>();
  return kernels;
}

}  // namespace kvkeep
