#include "sample_row.hpp"
#include "simd_portable.hpp"

namespace kvkeep {

const SampleKernels& sample_kernels_portable() {
  static constexpr SampleKernels kernels = sample_kernels_of<Portable>();
  return kernels;
}

}  // namespace kvkeep
