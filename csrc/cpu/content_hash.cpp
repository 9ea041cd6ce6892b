#include "cpu/content_hash.h"

#include <cstring>

namespace refinenet_fast::cpu {
namespace {

// Odd constants of high entropy (the fractional parts of the golden ratio and of the square root of 3).
constexpr uint64_t kMultiplier = 0x9e3779b97f4a7c15, kFinalizer = 0xbb67ae8584caa73b;
constexpr int kLanes = 8;  // independent chains, since a multiplication takes several cycles

uint64_t mix(uint64_t state, uint64_t word) {
  state = (state ^ word) * kMultiplier;
  return state ^ state >> 32;  // high bits back down: a product never moves them there
}

}  // namespace

uint64_t content_hash(const void* memory, size_t bytes) {
  const char* p = static_cast<const char*>(memory);
  uint64_t lanes[kLanes], words[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = kFinalizer * (i + 1);
  size_t left = bytes;
  for (; left >= sizeof(words); left -= sizeof(words), p += sizeof(words)) {
    std::memcpy(words, p, sizeof(words));
    for (int i = 0; i < kLanes; ++i) lanes[i] = mix(lanes[i], words[i]);
  }
  std::memset(words, 0, sizeof(words));
  std::memcpy(words, p, left);
  uint64_t hash = mix(kFinalizer, bytes);
  for (int i = 0; i < kLanes; ++i) hash = mix(hash, mix(lanes[i], words[i]));
  return hash;
}

}  // namespace refinenet_fast::cpu
