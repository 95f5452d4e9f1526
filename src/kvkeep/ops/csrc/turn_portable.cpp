#include "simd_portable.hpp"
#include "turn_row.hpp"

namespace kvkeep {

const TurnKernels& turn_kernels_portable() {
  static constexpr TurnKernels kernels = turn_kernels_of<Portable>();
  return kernels;
}

}  // namespace kvkeep
