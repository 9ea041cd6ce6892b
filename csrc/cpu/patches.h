// Tiles of a map and their patches of inputs, transformed: what Winograd's convolution and its weight gradient share.
#pragma once

#include "common/arguments.h"
#include "cpu/simd.h"
#include "cpu/winograd.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {

// Elements between things that are written together and would be a power of two apart: they would fall into the same
// few sets of the cache otherwise.
constexpr int64_t kStagger = 48;

// From one tile's transformed patch to the next one's.
static inline int64_t patch_pitch(int64_t c) { return round_up(c, kLanes) + 16; }

// Where a tile's outputs are: image n, rows from y, columns from x.
struct Tile {
  int64_t n, y, x;
};

// All tiles of a batch of maps, row by row.
struct Tiling {
  int64_t across, down, tiles;

  explicit Tiling(const Shape& s)
      : across(ceil_div(s.w, kTile)), down(ceil_div(s.h, kTile)), tiles(s.n * down * across) {}
  Tile tile(int64_t index) const {
    return {index / across / down, index / across % down * kTile, index % across * kTile};
  }
};

// One tile's patch, transformed, to v[point][c].
template <bool kRelu>
static void transform_patch(const float* x /* [N, H, W, C] */, const Shape& s, const Tile& tile,
                            float* v /* [36][.][pitch] */, int64_t point_stride) {
  int64_t at[kPoints];  // of the patch's pixels in x, -1 outside the image
  for (int64_t i = 0; i < kPoints; ++i) {
    const int64_t row = tile.y - 1 + i / kPatch, column = tile.x - 1 + i % kPatch;
    const bool inside = row >= 0 && row < s.h && column >= 0 && column < s.w;
    at[i] = inside ? ((tile.n * s.h + row) * s.w + column) * s.c : -1;
  }
  for_channels(s.c, [&](int64_t c, auto lanes) {
    Float patch[kPoints];
    for (int64_t j = 0; j < kPatch; ++j) {
      for (int64_t i = j; i < kPoints; i += kPatch) {
        const Float value = at[i] < 0 ? Float{} : load(x + at[i] + c, lanes);
        patch[i] = kRelu ? relu(value) : value;
      }
      winograd_input(patch + j, patch + j, kPatch);
    }
    for (int64_t i = 0; i < kPatch; ++i) {
      winograd_input(patch + i * kPatch, patch + i * kPatch, 1);
      for (int64_t j = 0; j < kPatch; ++j) store(v + (i * kPatch + j) * point_stride + c, patch[i * kPatch + j]);
    }
  });
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
