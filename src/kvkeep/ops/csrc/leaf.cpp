#include "leaf.hpp"

#include <algorithm>

#include "leaf_kernels.hpp"

namespace kvkeep {
namespace {

constexpr int64_t kAloneElements =
    16384;  // less work than this is done by the caller: waking the pool costs more
constexpr int64_t kSliceElements = 4096;  // a job of silu_mul
constexpr int64_t kMlpRows = 240;         // rows whose gate and up stay in the last-level cache

const LeafKernels& leaf_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return leaf_kernels_avx512();
  if (isa == Isa::kAvx2) return leaf_kernels_avx2();
#endif
  return leaf_kernels_portable();
}

template <class Fn>
void over(Backend& backend, int64_t jobs, int64_t elements, Fn fn) {
  if (elements > kAloneElements) return backend.pool.parallel_shares(jobs, fn);
  for (int64_t job = 0; job < jobs; job++) fn(job);
}

template <class T>
void silu_mul(Backend& backend, void (*kernel)(const T*, const T*, T*, int64_t), const T* gate_up,
              T* hidden, int64_t rows, int64_t width) {
  const int64_t slices = (width + kSliceElements - 1) / kSliceElements;
  over(backend, rows * slices, rows * width, [&](int64_t job) {
    const int64_t row = job / slices, first = job % slices * kSliceElements;
    const T* gate = gate_up + row * 2 * width + first;
    kernel(gate, gate + width, hidden + row * width + first,
           std::min(kSliceElements, width - first));
  });
}

}  // namespace

void rms_norm(Backend& backend, Dtype dtype, NestedRows x, const void* weight, void* out,
              int64_t dim, float eps) {
  const auto& kernels = leaf_kernels(backend.isa);
  const int64_t rows = x.outer * x.inner;
  over(backend, rows, rows * dim, [&](int64_t row) {
    const int64_t at = row / x.inner * x.outer_stride + row % x.inner * x.inner_stride;
    if (dtype == Dtype::kF32) {
      kernels.rms_norm_f32(static_cast<const float*>(x.data) + at,
                           static_cast<const float*>(weight), static_cast<float*>(out) + row * dim,
                           dim, eps);
    } else {
      kernels.rms_norm_bf16(static_cast<const uint16_t*>(x.data) + at,
                            static_cast<const uint16_t*>(weight),
                            static_cast<uint16_t*>(out) + row * dim, dim, eps);
    }
  });
}

void gated_mlp(Backend& backend, const PackedWeight& gate_up, const PackedWeight& down, Rows x,
               MutableRows out) {
  const auto& kernels = leaf_kernels(backend.isa);
  const int64_t width = down.k;
  const int64_t element = gate_up.dtype == Dtype::kF32 ? 4 : 2;
  for (int64_t first = 0; first < x.count; first += kMlpRows) {
    const int64_t rows = std::min(kMlpRows, x.count - first);
    auto* both = backend.scratch.gate_up.reserve<uint8_t>(rows * 2 * width * element);
    auto* hidden = backend.scratch.hidden.reserve<uint8_t>(rows * width * element);
    const auto* from = static_cast<const uint8_t*>(x.data) + first * x.stride * element;
    linear(backend, gate_up, {from, rows, x.stride}, nullptr, {both, 2 * width});
    if (gate_up.dtype == Dtype::kF32) {
      silu_mul(backend, kernels.silu_mul_f32, reinterpret_cast<const float*>(both),
               reinterpret_cast<float*>(hidden), rows, width);
    } else {
      silu_mul(backend, kernels.silu_mul_bf16, reinterpret_cast<const uint16_t*>(both),
               reinterpret_cast<uint16_t*>(hidden), rows, width);
    }
    auto* to = static_cast<uint8_t*>(out.data) + first * out.stride * element;
    linear(backend, down, {hidden, rows, width}, nullptr, {to, out.stride});
  }
}

}  // namespace kvkeep
