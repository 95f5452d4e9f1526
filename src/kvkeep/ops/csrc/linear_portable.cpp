#include "linear_block.hpp"
#include "simd_portable.hpp"

namespace kvkeep {

const LinearKernels& linear_kernels_portable() {
  using Block = LinearBlock<Portable>;
  static const LinearKernels kernels = {
      .block_lanes = Block::kLanes,
      .chunk_bytes = Block::kChunkBytes,
      .bf16_pairs = false,
      .f32 = &Block::run<Portable::F32>,
      .bf16 = &Block::run<Portable::Bf16>,
      .int8_f32 = &Block::run<Portable::Int8>,
      .int8_bf16 = &Block::run<Portable::Int8>,
  };
  return kernels;
}

}  // namespace kvkeep
