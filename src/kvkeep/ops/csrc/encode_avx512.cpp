#include "encode_tile.hpp"
#include "simd_avx512.hpp"

namespace kvkeep {

const EncodeKernels& encode_kernels_avx512() {
  static constexpr EncodeKernels kernels = encode_kernels_of<Avx512>();
  return kernels;
}

}  // namespace kvkeep
