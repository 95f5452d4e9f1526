#include "simd_avx2.hpp"
#include "turn_row.hpp"

namespace kvkeep {

const TurnKernels& turn_kernels_avx2() {
  static constexpr TurnKernels kernels = turn_kernels_of<Avx2>();
  return kernels;
}

}  // namespace kvkeep
