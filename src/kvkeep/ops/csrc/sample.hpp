// Choosing tokens from rows of logits: the largest, and draws in proportion to weights.
#pragma once

#include <cstdint>

#include "backend.hpp"
#include "linear.hpp"

namespace kvkeep {

// Both structs are rows of a numpy array: kvkeep.ops.cpu_sample names the same fields.
struct LargestRow {
  const void* logits;
  int64_t dtype;
  int64_t token;  // out
  double value;   // out; see Largest
};

struct DrawRow {
  const void* logits;
  int64_t dtype;
  float top, scale, bound;  // see Weighing
  float weight;             // out: the drawn token's
  int64_t ties;
  double uniform;  // in (0, 1)
  double mass;     // out: the sum of all kept weights
  int64_t token;   // out; -1 where no weight is kept
};

// Find the largest of `vocab` logits of every row.
void find_largest(Backend& backend, LargestRow* rows, int64_t count, int64_t vocab);

// Draw the id at which the running sum of kept weights passes `uniform` of the total.
void draw(Backend& backend, DrawRow* rows, int64_t count, int64_t vocab);

}  // namespace kvkeep
