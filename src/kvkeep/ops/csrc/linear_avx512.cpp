#include "linear_block.hpp"
#include "simd_avx512.hpp"

namespace kvkeep {

const LinearKernels& linear_kernels_avx512() {
  using Block = LinearBlock<Avx512>;
  static const LinearKernels kernels = {
      .block_lanes = Block::kLanes,
      .chunk_bytes = Block::kChunkBytes,
      .bf16_pairs = true,
      .f32 = &Block::run<Avx512::F32>,
      .bf16 = &Block::run<Avx512::Bf16>,
      .int8_f32 = &Block::run<Avx512::Int8F32>,
      .int8_bf16 = &Block::run<Avx512::Int8Bf16>,
  };
  return kernels;
}

}  // namespace kvkeep
