#include "encode.hpp"

#include <cstring>
#include <vector>

#include "encode_kernels.hpp"

namespace kvkeep {
namespace {

const EncodeKernels& encode_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return encode_kernels_avx512();
  if (isa == Isa::kAvx2) return encode_kernels_avx2();
#endif
  return encode_kernels_portable();
}

// Keys [kPage/16][words][16] as rows [kPage][words]; a word is a float or two bfloat16.
void key_rows(const uint8_t* tile, int64_t words, uint8_t* rows) {
  constexpr int64_t kTokens = 16, kBlock = 4;  // kBlock words of 16 tokens are turned at a time
  for (int64_t part = 0; part < attention::kPage / kTokens; part++) {
    const uint8_t* from = tile + part * words * kTokens * 4;
    uint8_t* to = rows + part * words * kTokens * 4;
    for (int64_t word = 0; word < words; word += kBlock) {
      uint32_t block[kBlock][kTokens];
      std::memcpy(block, from + word * kTokens * 4, sizeof(block));
      for (int64_t token = 0; token < kTokens; token++) {
        const uint32_t row[kBlock] = {block[0][token], block[1][token], block[2][token],
                                      block[3][token]};
        std::memcpy(to + (token * words + word) * 4, row, sizeof(row));
      }
    }
  }
}

// Values [kPage/2][dim][2] in 16 bits as rows [kPage][dim].
void value_rows(const uint16_t* __restrict tile, int64_t dim, uint16_t* __restrict rows) {
  for (int64_t pair = 0; pair < attention::kPage / 2; pair++) {
    const uint16_t* from = tile + pair * 2 * dim;
    uint16_t *even = rows + pair * 2 * dim, *odd = even + dim;
    for (int64_t d = 0; d < dim; d++) {
      even[d] = from[2 * d];
      odd[d] = from[2 * d + 1];
    }
  }
}

}  // namespace

void rows_of_tiles(const uint8_t* tiles, int64_t count, int64_t dim, int64_t element, uint8_t* k,
                   uint8_t* v) {
  const int64_t half = attention::kPage * dim * element;
  for (; count > 0; count--, tiles += 2 * half, k += half, v += half) {
    key_rows(tiles, dim * element / 4, k);
    if (element == 4) {
      std::memcpy(v, tiles + half, half);
    } else {
      value_rows(reinterpret_cast<const uint16_t*>(tiles + half), dim,
                 reinterpret_cast<uint16_t*>(v));
    }
  }
}

void encode(Isa isa, Dtype dtype, const Pages& pages, attention::Layout layout, bool first,
            double narrowed, const CodedTiles& to) {
  const auto& kernels = encode_kernels(isa);
  const attention::CodeShape shape(layout, static_cast<int>(pages.dim));
  const EncodeJob job{pages.dim,
                      shape.partition,
                      first ? attention::kSinks : 0,
                      shape.k_bits,
                      shape.v_bits,
                      static_cast<float>(narrowed),
                      static_cast<float>((1 - narrowed) / 2),
                      shape.k_scale,
                      shape.v_codes,
                      shape.v_scale,
                      shape.sinks,
                      first ? shape.end : shape.sinks};
  const int64_t elements = attention::kPage * pages.dim;
  std::vector<uint8_t> codes(elements);
  for (int64_t tile = 0; tile < pages.tiles; tile++) {
    const int64_t from = tile * elements;
    uint8_t* out = to.data + tile * to.stride;
    if (dtype == Dtype::kF32) {
      to.refused[tile] = kernels.f32(job, static_cast<const float*>(pages.k) + from,
                                     static_cast<const float*>(pages.v) + from, out, codes.data());
    } else {
      to.refused[tile] =
          kernels.bf16(job, static_cast<const uint16_t*>(pages.k) + from,
                       static_cast<const uint16_t*>(pages.v) + from, out, codes.data());
    }
  }
}

}  // namespace kvkeep
