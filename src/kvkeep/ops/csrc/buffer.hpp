// Aligned memory for weights and scratch; large buffers ask for huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace kvkeep {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);  // throws std::bad_alloc
  ~Buffer();
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  size_t bytes() const { return bytes_; }
  uint8_t* data() const { return data_; }

  // Return room for `bytes`, keeping nothing of what was there when it grows.
  template <class T>
  T* reserve(size_t count) {
    if (count * sizeof(T) > bytes_) *this = Buffer(count * sizeof(T) + count * sizeof(T) / 4);
    return reinterpret_cast<T*>(data_);
  }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace kvkeep
