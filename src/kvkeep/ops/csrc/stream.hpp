// How fast this machine reads memory: the ceiling of every kernel that streams weights or pages.
#pragma once

#include <cstdint>

#include "backend.hpp"

namespace kvkeep {

// Read every cache line of `bytes` with the backend's threads; return a sum that depends on all of
// them.
uint64_t read_all(Backend& backend, const uint8_t* data, int64_t bytes);

}  // namespace kvkeep
