#include "leaf_row.hpp"
#include "simd_portable.hpp"

namespace kvkeep {

const LeafKernels& leaf_kernels_portable() {
  static constexpr LeafKernels kernels = leaf_kernels_of<Portable>();
  return kernels;
}

}  // namespace kvkeep
