#include "sample_row.hpp"
#include "simd_avx512.hpp"

namespace kvkeep {

const SampleKernels& sample_kernels_avx512() {
  static constexpr SampleKernels kernels = sample_kernels_of<Avx512>();
  return kernels;
}

}  // namespace kvkeep
