// Keys and values as coded tiles: the bits of kvkeep.quant.hack, which is the oracle.
#pragma once

#include <cstdint>

#include "attention_job.hpp"
#include "cpu_features.hpp"
#include "linear.hpp"

namespace kvkeep {

struct Pages {
  const void* k;  // [tiles][kPage][dim], dense, as is v
  const void* v;
  int64_t tiles, dim;
};

// What is written for each tile, `stride` bytes apart, and what of it can't be: see encode_kernels.
struct CodedTiles {
  uint8_t* data;
  int64_t stride;
  uint8_t* refused;
};

// `first`: pages of a sequence's beginning, with their sinks. `narrowed`: the part of a channel's
// range that two-bit keys are fitted from; 0: the ends of the range are codes.
void encode(Isa isa, Dtype dtype, const Pages& pages, attention::Layout layout, bool first,
            double narrowed, const CodedTiles& to);

// Write rows k, v [tiles][kPage][dim] of tiles of the model's dtype, of `element` bytes: the
// inverse of how a step writes them (kvkeep/ops/layout.py).
void rows_of_tiles(const uint8_t* tiles, int64_t count, int64_t dim, int64_t element, uint8_t* k,
                   uint8_t* v);

}  // namespace kvkeep
