#include "sample.hpp"

#include <algorithm>

#include "sample_kernels.hpp"

namespace kvkeep {
namespace {

constexpr int64_t kSliceBlocks = 64;  // a job of draw
constexpr int64_t kAloneIds = 16384;  // less work than this is not worth waking the pool for

const SampleKernels& sample_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return sample_kernels_avx512();
  if (isa == Isa::kAvx2) return sample_kernels_avx2();
#endif
  return sample_kernels_portable();
}

template <class Fn>
void over(Backend& backend, int64_t jobs, int64_t ids, Fn fn) {
  if (ids > kAloneIds) return backend.pool.parallel_for(jobs, fn);
  for (int64_t job = 0; job < jobs; job++) fn(job);
}

// One row, with its dtype resolved.
class Row {
 public:
  Row(const SampleKernels& kernels, const DrawRow& row, int64_t vocab)
      : kernels_(kernels),
        row_(row),
        vocab_(vocab),
        how_{row.top, row.scale, row.bound, row.ties},
        wide_(row.dtype == static_cast<int64_t>(Dtype::kF32)) {}

  void sums(int64_t first, int64_t last, float* to) const {
    if (wide_) return kernels_.block_sums_f32(f32(), vocab_, how_, first, last, to);
    kernels_.block_sums_bf16(bf16(), vocab_, how_, first, last, to);
  }

  void weights(int64_t block, float* to) const {
    if (wide_) return kernels_.block_weights_f32(f32(), vocab_, how_, block, to);
    kernels_.block_weights_bf16(bf16(), vocab_, how_, block, to);
  }

 private:
  const float* f32() const { return static_cast<const float*>(row_.logits); }
  const uint16_t* bf16() const { return static_cast<const uint16_t*>(row_.logits); }

  const SampleKernels& kernels_;
  const DrawRow& row_;
  const int64_t vocab_;
  const Weighing how_;
  const bool wide_;
};

struct Place {
  int64_t index;
  double before;  // the sum of what comes before it
};

// Where the running sum of non-negative values passes `target`; the last above 0 if rounding keeps
// it from that, -1 if all are 0.
Place find(const float* values, int64_t count, double target) {
  Place place{-1, 0};
  double sum = 0;
  for (int64_t i = 0; i < count; i++) {
    if (values[i] <= 0) continue;
    place = {i, sum};
    sum += values[i];
    if (sum > target) break;
  }
  return place;
}

void pick(const Row& row, const float* sums, int64_t blocks, DrawRow& out) {
  out.mass = 0;
  for (int64_t i = 0; i < blocks; i++) out.mass += sums[i];
  const double target = out.uniform * out.mass;
  const Place block = find(sums, blocks, target);
  out.token = -1;
  out.weight = 0;
  if (block.index < 0) return;
  float weights[kBlock];
  row.weights(block.index, weights);
  const Place place = find(weights, kBlock, target - block.before);
  out.token = block.index * kBlock + place.index;
  out.weight = weights[place.index];
}

}  // namespace

void find_largest(Backend& backend, LargestRow* rows, int64_t count, int64_t vocab) {
  const auto& kernels = sample_kernels(backend.isa);
  over(backend, count, count * vocab, [&](int64_t job) {
    auto& row = rows[job];
    const Largest found =
        row.dtype == static_cast<int64_t>(Dtype::kF32)
            ? kernels.largest_f32(static_cast<const float*>(row.logits), vocab)
            : kernels.largest_bf16(static_cast<const uint16_t*>(row.logits), vocab);
    row.token = found.id;
    row.value = found.value;
  });
}

void draw(Backend& backend, DrawRow* rows, int64_t count, int64_t vocab) {
  const auto& kernels = sample_kernels(backend.isa);
  const int64_t blocks = (vocab + kBlock - 1) / kBlock;
  const int64_t slices = (blocks + kSliceBlocks - 1) / kSliceBlocks;
  auto* sums = backend.scratch.block_sums.reserve<float>(count * blocks);
  over(backend, count * slices, count * vocab, [&](int64_t job) {
    const int64_t row = job / slices, first = job % slices * kSliceBlocks;
    Row(kernels, rows[row], vocab)
        .sums(first, std::min(first + kSliceBlocks, blocks), sums + row * blocks);
  });
  over(backend, count, count * vocab, [&](int64_t job) {
    pick(Row(kernels, rows[job], vocab), sums + job * blocks, blocks, rows[job]);
  });
}

}  // namespace kvkeep
