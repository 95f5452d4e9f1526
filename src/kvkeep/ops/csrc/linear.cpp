#include "linear.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kvkeep {
namespace {

constexpr int64_t kPanelRows =
    240;  // rows whose activations and accumulators stay in the second-level cache
constexpr int64_t kStageAlone =
    8;  // fewer rows are staged by the caller: waking the pool costs more

const LinearKernels& linear_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return linear_kernels_avx512();
  if (isa == Isa::kAvx2) return linear_kernels_avx2();
#endif
  return linear_kernels_portable();
}

float widen(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

struct Source {
  Dtype dtype;
  const void* data;
  int64_t n, k, stride;

  float at(int64_t row, int64_t col) const {
    int64_t i = row * stride + col;
    return dtype == Dtype::kF32 ? static_cast<const float*>(data)[i]
                                : widen(static_cast<const uint16_t*>(data)[i]);
  }
};

float int8_scale(const Source& source, int64_t row) {
  float top = 0;
  for (int64_t k = 0; k < source.k; k++) top = std::max(top, std::fabs(source.at(row, k)));
  return top > 0 ? top / 127.0f : 1.0f;
}

// Copy one block's rows to [units][lanes][k per unit].
template <class T, class Get>
void fill_block(T* to, int64_t lanes, int64_t pair, int64_t units, const Source& source,
                int64_t first, Get get) {
  for (int64_t lane = 0; lane < lanes; lane++) {
    int64_t row = first + lane;
    for (int64_t unit = 0; unit < units; unit++) {
      for (int64_t i = 0; i < pair; i++) {
        int64_t k = unit * pair + i;
        to[(unit * lanes + lane) * pair + i] = row < source.n && k < source.k ? get(row, k) : T{};
      }
    }
  }
}

// Return x as the kernel's 4-byte units, staged where the caller's order does not serve.
Rows stage(Backend& backend, const PackedWeight& weight, Rows x) {
  const bool bf16 = weight.dtype == Dtype::kBf16;
  const bool pairs = bf16 && linear_kernels(weight.isa).bf16_pairs;
  if (!bf16) return x;
  if (pairs && weight.k % 2 == 0 && x.stride % 2 == 0) return {x.data, x.count, x.stride / 2};
  auto* staged = backend.scratch.staged.reserve<uint32_t>(x.count * weight.units);
  auto copy = [&](int64_t row) {
    auto* from = static_cast<const uint16_t*>(x.data) + row * x.stride;
    uint32_t* to = staged + row * weight.units;
    if (!pairs) {
      for (int64_t k = 0; k < weight.k; k++) to[k] = static_cast<uint32_t>(from[k]) << 16;
      return;
    }
    to[weight.units - 1] = 0;
    std::memcpy(to, from, weight.k * sizeof(uint16_t));
  };
  if (x.count <= kStageAlone) {
    for (int64_t row = 0; row < x.count; row++) copy(row);
  } else {
    backend.pool.parallel_shares(x.count, copy);
  }
  return {staged, x.count, weight.units};
}

auto kernel_of(const LinearKernels& kernels, const PackedWeight& weight) {
  if (weight.dtype == Dtype::kF32) return weight.int8 ? kernels.int8_f32 : kernels.f32;
  return weight.int8 ? kernels.int8_bf16 : kernels.bf16;
}

}  // namespace

PackedWeight pack_weight(Backend& backend, Dtype dtype, bool int8, const void* weight, int64_t n,
                         int64_t k, int64_t stride) {
  const auto& kernels = linear_kernels(backend.isa);
  const int64_t lanes = kernels.block_lanes;
  const int64_t pair = dtype == Dtype::kBf16 && kernels.bf16_pairs ? 2 : 1;
  const int64_t units = (k + pair - 1) / pair;
  const int64_t element = int8 ? 1 : dtype == Dtype::kF32 ? 4 : 2;
  const int64_t blocks = (n + lanes - 1) / lanes;
  const int64_t block_bytes = units * pair * lanes * element;
  PackedWeight packed{
      backend.isa, dtype, int8, n, k, units, block_bytes, Buffer(blocks * block_bytes), {}};
  if (int8) packed.scales = Buffer(blocks * lanes * sizeof(float));
  const Source source{dtype, weight, n, k, stride};
  backend.pool.parallel_for(blocks, [&](int64_t block) {
    uint8_t* to = packed.data.data() + block * block_bytes;
    const int64_t first = block * lanes;
    if (int8) {
      auto* scales = reinterpret_cast<float*>(packed.scales.data()) + first;
      for (int64_t i = 0; i < lanes; i++)
        scales[i] = first + i < n ? int8_scale(source, first + i) : 1.0f;
      fill_block(
          reinterpret_cast<int8_t*>(to), lanes, pair, units, source, first,
          [&](int64_t row, int64_t col) {
            return static_cast<int8_t>(std::nearbyint(source.at(row, col) / scales[row - first]));
          });
    } else if (dtype == Dtype::kF32) {
      auto* from = static_cast<const float*>(weight);
      fill_block(reinterpret_cast<float*>(to), lanes, pair, units, source, first,
                 [&](int64_t row, int64_t col) { return from[row * stride + col]; });
    } else {
      auto* from = static_cast<const uint16_t*>(weight);
      fill_block(reinterpret_cast<uint16_t*>(to), lanes, pair, units, source, first,
                 [&](int64_t row, int64_t col) { return from[row * stride + col]; });
    }
  });
  return packed;
}

void linear(Backend& backend, const PackedWeight& weight, Rows x, const void* bias,
            MutableRows out) {
  if (x.count == 0) return;
  const auto& kernels = linear_kernels(weight.isa);
  const auto kernel = kernel_of(kernels, weight);
  const int64_t lanes = kernels.block_lanes;
  const int64_t blocks = (weight.n + lanes - 1) / lanes;
  const int64_t panels = (x.count + kPanelRows - 1) / kPanelRows;
  const int64_t element = weight.dtype == Dtype::kF32 ? 4 : 2;
  const Rows staged = stage(backend, weight, x);
  const int64_t spill_bytes = kPanelRows * lanes * sizeof(float);
  uint8_t* scratch = backend.scratch.per_thread.reserve<uint8_t>(
      backend.pool.threads() * (spill_bytes + kernels.chunk_bytes));
  backend.pool.parallel_shares(blocks * panels, [&](int64_t job, int thread) {
    const int64_t block = job / panels, panel = job % panels;
    const int64_t row = x.count * panel / panels, end = x.count * (panel + 1) / panels;
    uint8_t* own = scratch + thread * (spill_bytes + kernels.chunk_bytes);
    const int64_t first = block * lanes;
    kernel({
        .weights = weight.data.data() + block * weight.block_bytes,
        .x = static_cast<const uint32_t*>(staged.data) + row * staged.stride,
        .x_stride = staged.stride,
        .units = weight.units,
        .rows = end - row,
        .lanes = std::min(lanes, weight.n - first),
        .scales =
            weight.int8 ? reinterpret_cast<const float*>(weight.scales.data()) + first : nullptr,
        .bias = bias ? static_cast<const uint8_t*>(bias) + first * element : nullptr,
        .out = static_cast<uint8_t*>(out.data) + (row * out.stride + first) * element,
        .out_stride = out.stride,
        .out_bf16 = weight.dtype == Dtype::kBf16,
        .spill = reinterpret_cast<float*>(own),
        .decoded = own + spill_bytes,
    });
  });
}

}  // namespace kvkeep
