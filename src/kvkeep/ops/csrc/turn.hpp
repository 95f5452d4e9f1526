// Rows of heads times a matrix of their KV head's own.
#pragma once

#include <cstdint>

#include "backend.hpp"
#include "linear.hpp"

namespace kvkeep {

enum class TurnKind { kOrder, kButterfly, kMatrix };

// Of each KV head: kOrder [dim] places; kButterfly [3][dim] places and factors, a Hadamard sum
// after the first and the second; kMatrix [dim][dim] in `factor`.
struct Turns {
  TurnKind kind;
  const int32_t* order;
  const float* factor;
};

struct TurnRows {
  const void* x;
  int64_t rows, row_stride, head_stride;  // in elements
  int64_t heads, kv_heads, dim;
  void* out;  // [rows][heads][dim], dense
};

void turn_heads(Backend& backend, Dtype dtype, const Turns& turns, const TurnRows& rows);

}  // namespace kvkeep
