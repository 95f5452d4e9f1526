#include "encode_tile.hpp"
#include "simd_avx2.hpp"

namespace kvkeep {

const EncodeKernels& encode_kernels_avx2() {
  static constexpr EncodeKernels kernels = encode_kernels_of<Avx2>();
  return kernels;
}

}  // namespace kvkeep
