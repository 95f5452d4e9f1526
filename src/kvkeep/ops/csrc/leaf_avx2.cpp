#include "leaf_row.hpp"
#include "simd_avx2.hpp"

namespace kvkeep {

const LeafKernels& leaf_kernels_avx2() {
  static constexpr LeafKernels kernels = leaf_kernels_of<Avx2>();
  return kernels;
}

}  // namespace kvkeep
