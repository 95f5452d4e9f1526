#include "leaf_row.hpp"
#include "simd_avx512.hpp"

namespace kvkeep {

const LeafKernels& leaf_kernels_avx512() {
  static constexpr LeafKernels kernels = leaf_kernels_of<Avx512>();
  return kernels;
}

}  // namespace kvkeep
