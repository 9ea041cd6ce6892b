#include "cpu/content_hash.h"

#include <cstring>

#include "cpu/kernels.h"

namespace refinenet_fast::cpu {
namespace {

// Odd constants of high entropy (the fractional parts of the golden ratio and of the square root of 3).
constexpr uint64_t kMultiplier = 0x9e3779b97f4a7c15, kFinalizer = 0xbb67ae8584caa73b;
constexpr int kLanes = 8;  // independent chains, since a multiplication takes several cycles

uint64_t mix(uint64_t state, uint64_t word) {
  state = (state ^ word) * kMultiplier;
  return state ^ state >> 32;  // high bits back down: a product never moves them there
}

uint64_t chunk_hash(const char* p, size_t bytes) {
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

}  // namespace

uint64_t content_hash(const void* memory, size_t bytes, int threads) {
  constexpr size_t kChunk = 128 * 1024;
  const int64_t chunks = static_cast<int64_t>((bytes + kChunk - 1) / kChunk);
  const Workspace workspace(chunks * sizeof(uint64_t));
  uint64_t* hashes = reinterpret_cast<uint64_t*>(workspace.data());
#pragma omp parallel for num_threads(threads) if (chunks > 1) schedule(static)
  for (int64_t i = 0; i < chunks; ++i) {
    const size_t begin = i * kChunk;
    hashes[i] = chunk_hash(static_cast<const char*>(memory) + begin, bytes - begin < kChunk ? bytes - begin : kChunk);
  }
  return chunk_hash(reinterpret_cast<const char*>(hashes), chunks * sizeof(uint64_t));
}

}  // namespace refinenet_fast::cpu
