#include "encode_tile.hpp"
#include "simd_portable.hpp"

namespace kvkeep {

const EncodeKernels& encode_kernels_portable() {
  static constexpr EncodeKernels kernels = encode_kernels_of<Portable>();
  return kernels;
}

}  // namespace kvkeep
