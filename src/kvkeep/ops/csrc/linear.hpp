// y = x W^T + b on packed weights. An output is the sum over k = 0..K-1 in rising order into one
// float32 accumulator, whatever the number of rows, the row's place among them and the number of
// threads.
//
// Packed order: [N / lanes][units][lanes][k per unit], N padded with zeros to whole blocks. A unit
// is one k, or a pair of them where the CPU multiplies bf16 pairs; a thread walks consecutive
// blocks, so it reads one stream of memory.
#pragma once

#include <cstdint>

#include "backend.hpp"
#include "buffer.hpp"
#include "linear_kernels.hpp"

namespace kvkeep {

enum class Dtype { kF32 = 0, kBf16 = 1 };

struct PackedWeight {
  Isa isa;
  Dtype dtype;  // of the activations it is applied to
  bool int8;
  int64_t n;
  int64_t k;
  int64_t units;
  int64_t block_bytes;
  Buffer data;
  Buffer scales;  // float32 per output, int8 only
};

struct Rows {
  const void* data;
  int64_t count;
  int64_t stride;  // in elements
};

struct MutableRows {
  void* data;
  int64_t stride;  // in elements
};

// Pack weight [n, k]; with int8, q = round(w / scale) and scale = max |w| / 127 per output.
PackedWeight pack_weight(Backend& backend, Dtype dtype, bool int8, const void* weight, int64_t n,
                         int64_t k, int64_t stride);

void linear(Backend& backend, const PackedWeight& weight, Rows x, const void* bias,
            MutableRows out);

}  // namespace kvkeep
