// Which kernel an implicit matrix product takes, and how many blocks: pure functions of the request, in plain C++. (The
// loop for sm_90a has its plan in plan_sm90.h.)
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cuda/arguments.h"
#include "cuda/index.h"
#include "cuda/pooled_tile.h"

namespace refinenet_fast::cuda {

constexpr int kProductThreads = 128;      // 2x2 warps, each with a quarter of the block's tile
constexpr int kStages = 4;                // of the ring in shared memory
constexpr int kLarge = 128, kSmall = 64;  // tiles
constexpr int kWide = 256;      // output channels of a block that pools, or kSmall; its pixels are kTilePixels
constexpr int kPoolStages = 3;  // of its ring
constexpr int kResident = 2;    // blocks of large tiles that one multiprocessor holds
constexpr int64_t kMostCounted = (int64_t{1} << 31) - kLarge;
constexpr int64_t kMostParts = int64_t{16} << 20;  // sums of all splits: 64 MB
constexpr int kFewestSteps = 8;                    // of a convolution's split: fewer hardly fill the ring

struct Plan {
  int tile;   // kLarge or kSmall; of what pools kWide or kSmall
  int piece;  // bytes in which pixels are copied: whole chunks of 16, otherwise 8, 4 or an element, by small tiles
  int64_t blocks;
  int shared_bytes;
  int splits;     // of the input channels of a convolution, of the pixels of a weight gradient
  int shares;     // in which blocks that read the same gradient divide a split between them, for the bias
  int64_t parts;  // floats for all of these
};

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The most bytes, of 16, 8, 4 and an element, that divide every pixel of these tensors and their addresses.
inline int piece_of(DType dtype, std::initializer_list<int64_t> channels, std::initializer_list<const void*> maps) {
  uint64_t bits = 0;
  for (int64_t c : channels) bits |= static_cast<uint64_t>(c * bytes_of(dtype));
  for (const void* map : maps) bits |= reinterpret_cast<uintptr_t>(map);
  int piece = kChunkBytes;
  while (piece > bytes_of(dtype) && bits % piece != 0) piece /= 2;
  return piece;
}

// A stage is `tile` rows of 64 bytes of each operand in the convolution, and as much in the weight gradient.
inline int ring_bytes(int tile) { return kStages * 2 * tile * kNarrowRow; }

// Why no kernel takes these sizes; null: one does. They are counted in 32 bits; addresses take 64.
inline const char* refusal(const Shape& s, int64_t k, bool pool = false) {
  if (s.n <= 0 || s.h <= 0 || s.w <= 0 || s.c <= 0 || k <= 0) return "there is nothing to compute";
  const int64_t most = kMostCounted;
  if (s.h > most / s.w || s.n > most / (s.h * s.w)) return "more than 2^31 - 128 pixels";
  if (s.c > most / 9 || k > most / 9 / s.c) return "more than 2^31 - 128 weights";
  const int64_t tiles = pool ? tiles_of(s) : blocks_of<int64_t>(pixels_of(s), kSmall);
  if (tiles > most / blocks_of<int64_t>(k, kSmall)) return "more than 2^31 - 128 blocks";
  return nullptr;
}

// Whether launchers take a request; Python asks refusal(), and has checked the rest.
template <class Request>
bool is_sound(const Request& p, bool pool = false) {
  return !refusal(p.shape, p.k, pool) && (p.side == 1 || p.side == 3);
}

// Whether every pixel of what a way out reads and writes is whole chunks.
inline bool whole_out(const PackedConvolution& p) {
  int piece = piece_of(p.dtype, {p.k}, {p.parts, p.out.y, p.out.relued, p.out.select, p.out.low});
  for (int i = 0; i < p.out.adds; ++i) piece = std::min(piece, piece_of(p.dtype, {p.k}, {p.out.add[i]}));
  return piece == kChunkBytes;
}

// A block that pools computes 256 output channels of 64 pixels rather than 128 of 128: for 256 channels it pools once,
// of each pixel 144 / 64 (1x1) or 196 / 64 (3x3) neighbours, and two such fit into sm_80's 164 KB. Predicted for 256 ->
// 256 channels of 16 bits, per tile and slice of 32 channels, in cycles of one of an A100's multiprocessors, 1x1 (3x3):
//   memory                   map read and written, 8 KB at 10 B            800   (800)
//   L2                       9 KB of pixels, 16 KB a tap of weights        640 (4000), at 40 B
//   tensor cores             2^19 multiplications a tap                    512 (4608), at 1024
//   shared memory            pool 25 (36) KB, fragments 32 KB a tap        460 (2600), at 128 B
// Blocks of 128 x 128 would spend 376 (496) cycles of shared memory on the pool instead of 200 (288).
inline Plan pool_plan(const PackedConvolution& p, int processors) {
  const auto blocks = [&](int64_t outs) { return tiles_of(p.shape) * blocks_of(p.k, outs); };
  const bool wide = p.tile ? p.tile == kWide : p.k > 2 * kSmall && blocks(kWide) >= processors;
  const int outs = wide && !p.exact ? kWide : kSmall;  // three products would take more than a thread's registers
  const int slices =
      p.side == 1 ? PooledTile<1>::kSlices * PooledTile<1>::kBytes : PooledTile<3>::kSlices * PooledTile<3>::kBytes;
  const int way_out = kTilePixels * pitch_of(outs) * static_cast<int>(sizeof(float));
  const int bytes = std::max(kPoolStages * outs * kNarrowRow + slices, way_out);
  return {outs, piece_of(p.dtype, {p.shape.c}, {p.x}), blocks(outs), bytes, 1, 1, 0};
}

// Splits of the `slices` of input channels, whole ones, so that blocks take whole slices: where there are fewer tiles
// than multiprocessors, as many as give these `resident` blocks each, of so many steps at least.
inline int splits_of(const PackedConvolution& p, int64_t tiles, int64_t slices, int processors, int resident,
                     int fewest_steps) {
  int64_t splits = p.splits;
  if (!splits && tiles < processors) {
    splits = std::min(resident * processors / tiles, slices * p.side * p.side / fewest_steps);
  }
  splits = std::min({splits, slices, kMostParts / (pixels_of(p.shape) * p.k)});
  return static_cast<int>(std::max<int64_t>(splits, 1));
}

// Floats for the sums of all splits; of one they go the way out.
inline int64_t parts_of(const PackedConvolution& p, int splits) {
  return splits > 1 ? splits * pixels_of(p.shape) * p.k : 0;
}

// Large tiles read each operand half as often; small ones are more blocks, and waste less where channels are few.
inline Plan plan(const PackedConvolution& p, int processors) {
  if (p.pool_in) return pool_plan(p, processors);
  const int piece = piece_of(p.dtype, {p.shape.c}, {p.x});
  const auto blocks = [&](int64_t tile) { return blocks_of(pixels_of(p.shape), tile) * blocks_of(p.k, tile); };
  const bool large = p.tile ? p.tile >= kLarge : p.k > kSmall && blocks(kLarge) >= processors;
  const int tile = piece == kChunkBytes && large ? kLarge : kSmall;
  const int way_out = tile * pitch_of(tile) * static_cast<int>(sizeof(float)), ring = ring_bytes(tile);
  const int64_t slices = blocks_of(p.shape.c, kNarrowRow / bytes_of(p.dtype));
  const int splits = splits_of(p, blocks(tile), slices, processors, kResident, kFewestSteps);
  return {tile, piece, blocks(tile) * splits, std::max(ring, way_out), splits, 1, parts_of(p, splits)};
}

// Pixels of one stage of the weight gradient.
inline int64_t pixels_of_stage(DType dtype) { return kNarrowRow / bytes_of(dtype); }

// As many splits as fill the multiprocessors once, of eight stages at least, their sums no more than 64 MB. Three
// products of large tiles would take more than a thread's registers.
inline Plan plan(const PackedWeightGrad& p, int processors) {
  const int64_t c = p.shape.c, taps = p.side * p.side, elements = p.k * taps * c;
  const int piece = piece_of(p.dtype, {c, p.k}, {p.x, p.gy});
  const bool large = p.tile ? p.tile == kLarge : c > kSmall && p.k > kSmall;
  const int tile = piece == kChunkBytes && large && !p.exact ? kLarge : kSmall;
  const int64_t blocks = blocks_of<int64_t>(p.k, tile) * taps * blocks_of<int64_t>(c, tile);
  int64_t splits = kResident * processors / blocks;
  for (int64_t most : {blocks_of(pixels_of(p.shape), pixels_of_stage(p.dtype)) / 8, (int64_t{16} << 20) / elements}) {
    if (splits > most) splits = most;
  }
  if (splits < 1) splits = 1;
  if (p.splits) splits = p.splits;
  const int64_t shares = taps * blocks_of<int64_t>(c, tile), parts = splits * (elements + shares * p.k);
  return {tile, piece, blocks * splits, ring_bytes(tile), static_cast<int>(splits), static_cast<int>(shares), parts};
}

}  // namespace refinenet_fast::cuda
