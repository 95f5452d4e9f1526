#include "linear_block.hpp"
#include "simd_avx2.hpp"

namespace kvkeep {

const LinearKernels& linear_kernels_avx2() {
  using Block = LinearBlock<Avx2>;
  static const LinearKernels kernels = {
      .block_lanes = Block::kLanes,
      .chunk_bytes = Block::kChunkBytes,
      .bf16_pairs = false,
      .f32 = &Block::run<Avx2::F32>,
      .bf16 = &Block::run<Avx2::Bf16>,
      .int8_f32 = &Block::run<Avx2::Int8>,
      .int8_bf16 = &Block::run<Avx2::Int8>,
  };
  return kernels;
}

}  // namespace kvkeep
