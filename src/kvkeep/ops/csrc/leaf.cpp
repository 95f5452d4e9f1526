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

void rms_norm(Backend& backend, Dtype dtype, const void* x, int64_t rows, const void* weight,
              void* out, int64_t dim, float eps) {
  const auto& kernels = leaf_kernels(backend.isa);
  over(backend, rows, rows * dim, [&](int64_t row) {
    const int64_t at = row * dim;
    if (dtype == Dtype::kF32) {
      kernels.rms_norm_f32(static_cast<const float*>(x) + at, static_cast<const float*>(weight),
                           static_cast<float*>(out) + at, dim, eps);
    } else {
      kernels.rms_norm_bf16(static_cast<const uint16_t*>(x) + at,
                            static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(out) + at,
                            dim, eps);
    }
  });
}

void rotate_heads(Backend& backend, Dtype dtype, HeadRows x, const void* cos, const void* sin,
                  HeadNorm norm) {
  const auto& kernels = leaf_kernels(backend.isa);
  const int64_t heads = x.q_heads + x.kv_heads;
  auto each_head = [&](auto type, auto normalise, auto rotate, int64_t row) {
    using T = decltype(type);
    T* head = static_cast<T*>(x.data) + row * x.stride;
    for (int64_t h = 0; h < heads; h++, head += x.dim) {
      auto* weight = static_cast<const T*>(h < x.q_heads ? norm.q : norm.k);
      if (weight) normalise(head, weight, head, x.dim, norm.eps);
      rotate(head, static_cast<const T*>(cos) + row * x.dim,
             static_cast<const T*>(sin) + row * x.dim, x.dim);
    }
  };
  over(backend, x.rows, x.rows * heads * x.dim, [&](int64_t row) {
    if (dtype == Dtype::kF32) {
      each_head(float{}, kernels.rms_norm_f32, kernels.rotate_f32, row);
    } else {
      each_head(uint16_t{}, kernels.rms_norm_bf16, kernels.rotate_bf16, row);
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
