// A 64-bit hash of memory, by which packed weights are found again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace refinenet_fast::cpu {

// Sensitive to every bit and its position; not against an adversary.
uint64_t content_hash(const void* memory, size_t bytes);

}  // namespace refinenet_fast::cpu
