// Row-wise kernels beside the linear layer.
#pragma once

#include <cstdint>

#include "backend.hpp"
#include "linear.hpp"

namespace kvkeep {

// Rows in two levels, such as tokens and heads.
struct NestedRows {
  const void* data;
  int64_t outer, outer_stride;  // strides in elements
  int64_t inner, inner_stride;
};

// Normalise rows of `dim` elements into `out`, contiguous.
void rms_norm(Backend& backend, Dtype dtype, NestedRows x, const void* weight, void* out,
              int64_t dim, float eps);

// out = down(silu(gate(x)) * up(x)), `gate_up` holding the gate's outputs first.
void gated_mlp(Backend& backend, const PackedWeight& gate_up, const PackedWeight& down, Rows x,
               MutableRows out);

}  // namespace kvkeep
