// Row-wise kernels beside the linear layer.
#pragma once

#include <cstdint>

#include "backend.hpp"
#include "linear.hpp"

namespace kvkeep {

// Normalise dense rows of `dim` elements into `out`.
void rms_norm(Backend& backend, Dtype dtype, const void* x, int64_t rows, const void* weight,
              void* out, int64_t dim, float eps);

// The heads of projected rows: queries, then keys, then values, `dim` elements each.
struct HeadRows {
  void* data;
  int64_t rows, stride;  // in elements
  int64_t q_heads, kv_heads, dim;
};

// Weights [dim] that normalise query and key heads before rotation; null where there are none.
struct HeadNorm {
  const void* q;
  const void* k;
  float eps;
};

// Normalise and rotate query and key heads in place; `cos` and `sin` are [rows][dim].
void rotate_heads(Backend& backend, Dtype dtype, HeadRows x, const void* cos, const void* sin,
                  HeadNorm norm);

// out = down(silu(gate(x)) * up(x)), `gate_up` holding the gate's outputs first.
void gated_mlp(Backend& backend, const PackedWeight& gate_up, const PackedWeight& down, Rows x,
               MutableRows out);

}  // namespace kvkeep
