#include "turn.hpp"

#include "turn_kernels.hpp"

namespace kvkeep {
namespace {

constexpr int64_t kAloneElements = 16384;  // less is done by the caller: waking the pool costs more

const TurnKernels& turn_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return turn_kernels_avx512();
  if (isa == Isa::kAvx2) return turn_kernels_avx2();
#endif
  return turn_kernels_portable();
}

template <class T>
void turn_row(const TurnRowKernels<T>& kernels, const Turns& turns, const TurnRows& rows,
              int64_t row, float* scratch) {
  const int64_t dim = rows.dim, group = rows.heads / rows.kv_heads;
  const T* x = static_cast<const T*>(rows.x) + row * rows.row_stride;
  T* out = static_cast<T*>(rows.out) + row * rows.heads * dim;
  for (int64_t h = 0; h < rows.heads; h++, x += rows.head_stride, out += dim) {
    const int64_t head = h / group;
    if (turns.kind == TurnKind::kOrder) {
      kernels.order(x, turns.order + head * dim, out, dim);
    } else if (turns.kind == TurnKind::kButterfly) {
      const int64_t at = head * 3 * dim;
      kernels.butterfly(x, turns.order + at, turns.factor + at, out, dim, scratch);
    } else {
      kernels.matrix(x, turns.factor + head * dim * dim, out, dim, scratch);
    }
  }
}

}  // namespace

void turn_heads(Backend& backend, Dtype dtype, const Turns& turns, const TurnRows& rows) {
  const auto& kernels = turn_kernels(backend.isa);
  float* scratch = backend.scratch.per_thread.reserve<float>(backend.pool.threads() * 2 * rows.dim);
  auto turn = [&](int64_t row, int thread) {
    float* own = scratch + thread * 2 * rows.dim;
    if (dtype == Dtype::kF32) return turn_row(kernels.f32, turns, rows, row, own);
    turn_row(kernels.bf16, turns, rows, row, own);
  };
  if (rows.rows * rows.heads * rows.dim > kAloneElements)
    return backend.pool.parallel_shares(rows.rows, turn);
  for (int64_t row = 0; row < rows.rows; row++) turn(row, 0);
}

}  // namespace kvkeep
