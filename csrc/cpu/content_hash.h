// A 64-bit hash of memory, by which packed weights are found again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace refinenet_fast::cpu {

// Sensitive to every bit and its position; not against an adversary. The same for any number of threads.
uint64_t content_hash(const void* memory, size_t bytes, int threads);

}  // namespace refinenet_fast::cpu
