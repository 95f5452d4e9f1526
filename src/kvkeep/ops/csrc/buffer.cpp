#include "buffer.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace kvkeep {
namespace {
constexpr size_t kLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kReadAhead =
    4096;  // kernels prefetch past a buffer's end; keep that inside the allocation
}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  size_t align = bytes >= kHugePage / 2 ? kHugePage : kLine;
  size_t room = (bytes + kReadAhead + kLine - 1) / kLine * kLine;
  void* memory = nullptr;
  if (posix_memalign(&memory, align, room) != 0) throw std::bad_alloc();
  if (align == kHugePage) madvise(memory, room, MADV_HUGEPAGE);
  data_ = static_cast<uint8_t*>(memory);
}

Buffer::~Buffer() { std::free(data_); }

}  // namespace kvkeep
