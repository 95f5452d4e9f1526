#include "stream.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace kvkeep {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kSlice = 256 << 10;
constexpr int64_t kAhead = 8192;

uint64_t read_slice(const uint8_t* data, int64_t lines) {
  uint64_t sum[8] = {};
  for (int64_t i = 0; i < lines; i++) {
    uint64_t words[8];
    std::memcpy(words, data + i * kLine, sizeof(words));
    __builtin_prefetch(data + i * kLine + kAhead, 0, 2);
    for (int w = 0; w < 8; w++) sum[w] += words[w];
  }
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

}  // namespace

uint64_t read_all(Backend& backend, const uint8_t* data, int64_t bytes) {
  std::atomic<uint64_t> total{0};
  backend.pool.parallel_shares((bytes + kSlice - 1) / kSlice, [&](int64_t slice) {
    const int64_t first = slice * kSlice;
    const int64_t lines = std::min(kSlice, bytes - first) / kLine;
    total.fetch_add(read_slice(data + first, lines), std::memory_order_relaxed);
  });
  return total.load();
}

}  // namespace kvkeep
