#include "simd_avx512.hpp"
#include "turn_row.hpp"

namespace kvkeep {

const TurnKernels& turn_kernels_avx512() {
  static constexpr TurnKernels kernels = turn_kernels_of<Avx512>();
  return kernels;
}

}  // namespace kvkeep
