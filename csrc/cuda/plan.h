// Which kernel an implicit matrix product takes, and how many blocks: pure functions of the request, in plain C++.
#pragma once

#include <initializer_list>

#include "cuda/arguments.h"
#include "cuda/index.h"

namespace refinenet_fast::cuda {

constexpr int kProductThreads = 128;      // 2x2 warps, each with a quarter of the block's tile
constexpr int kStages = 4;                // of the ring in shared memory
constexpr int kLarge = 128, kSmall = 64;  // tiles
constexpr int kResident = 2;              // blocks of large tiles that one multiprocessor holds
constexpr int64_t kMostCounted = (int64_t{1} << 31) - kLarge;

struct Plan {
  int tile;           // kLarge or kSmall
  bool whole_chunks;  // pixels are copied in chunks of 16 bytes, otherwise element by element, by small tiles
  int64_t blocks;
  int shared_bytes;
  int splits;  // of the pixels of a weight gradient
};

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether every pixel of these tensors is whole chunks at multiples of 16 bytes.
inline bool whole_chunks(DType dtype, std::initializer_list<int64_t> channels,
                         std::initializer_list<const void*> maps) {
  bool whole = true;
  for (int64_t c : channels) whole = whole && c * bytes_of(dtype) % kChunkBytes == 0;
  for (const void* map : maps) whole = whole && reinterpret_cast<uintptr_t>(map) % kChunkBytes == 0;
  return whole;
}

// A stage is `tile` rows of 64 bytes of each operand in the convolution, and as much in the weight gradient.
inline int ring_bytes(int tile) { return kStages * 2 * tile * kNarrowRow; }

// Why no kernel takes these sizes; null: one does. They are counted in 32 bits; addresses take 64.
inline const char* refusal(const Shape& s, int64_t k) {
  if (s.n <= 0 || s.h <= 0 || s.w <= 0 || s.c <= 0 || k <= 0) return "there is nothing to compute";
  const int64_t most = kMostCounted;
  if (s.h > most / s.w || s.n > most / (s.h * s.w)) return "more than 2^31 - 128 pixels";
  if (s.c > most / 9 || k > most / 9 / s.c) return "more than 2^31 - 128 weights";
  if (blocks_of<int64_t>(pixels_of(s), kSmall) > most / blocks_of<int64_t>(k, kSmall))
    return "more than 2^31 - 128 blocks";
  return nullptr;
}

// The same of everything that a way out reads and writes.
inline bool whole_out(const PackedConvolution& p) {
  bool whole = whole_chunks(p.dtype, {p.k}, {p.out.y, p.out.relued, p.out.select, p.out.low});
  for (int i = 0; i < p.out.adds; ++i) whole = whole && whole_chunks(p.dtype, {p.k}, {p.out.add[i]});
  return whole;
}

// Large tiles read each operand half as often; small ones are more blocks, and waste less where channels are few.
inline Plan plan(const PackedConvolution& p, int processors) {
  const bool whole = whole_chunks(p.dtype, {p.shape.c}, {p.x});
  const auto blocks = [&](int64_t tile) { return blocks_of(pixels_of(p.shape), tile) * blocks_of(p.k, tile); };
  const bool large = p.tile ? p.tile == kLarge : p.k > kSmall && blocks(kLarge) >= processors;
  const int tile = whole && large ? kLarge : kSmall;
  const int way_out = tile * pitch_of(tile) * static_cast<int>(sizeof(float)), ring = ring_bytes(tile);
  return {tile, whole, blocks(tile), ring > way_out ? ring : way_out, 1};
}

// Pixels of one stage of the weight gradient.
inline int64_t pixels_of_stage(DType dtype) { return kNarrowRow / bytes_of(dtype); }

// As many splits as fill the multiprocessors once, of eight stages at least, their sums no more than 64 MB. Three
// products of large tiles would take more than a thread's registers.
inline Plan plan(const PackedWeightGrad& p, int processors) {
  const int64_t c = p.shape.c, taps = p.side * p.side, elements = p.k * taps * c;
  const bool whole = whole_chunks(p.dtype, {c, p.k}, {p.x, p.gy});
  const bool large = p.tile ? p.tile == kLarge : c > kSmall && p.k > kSmall;
  const int tile = whole && large && !p.exact ? kLarge : kSmall;
  const int64_t blocks = blocks_of<int64_t>(p.k, tile) * taps * blocks_of<int64_t>(c, tile);
  int64_t splits = kResident * processors / blocks;
  for (int64_t most : {blocks_of(pixels_of(p.shape), pixels_of_stage(p.dtype)) / 8, (int64_t{16} << 20) / elements}) {
    if (splits > most) splits = most;
  }
  if (splits < 1) splits = 1;
  if (p.splits) splits = p.splits;
  return {tile, whole, blocks * splits, ring_bytes(tile), static_cast<int>(splits)};
}

}  // namespace refinenet_fast::cuda
