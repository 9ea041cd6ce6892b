// Tiles of a map and their patches of inputs, transformed: what Winograd's convolution and its weight gradient share.
#pragma once

#include "common/arguments.h"
#include "cpu/simd.h"
#include "cpu/winograd.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {

// Elements between things that are written together and would be a power of two apart: they would fall into the same
// few sets of the cache otherwise.
constexpr int64_t kStagger = 48;
constexpr int64_t kChunk = 64;  // channels of a padded patch that are copied at a time

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

// A patch of some channels, transformed, to v[point]; its pixels are `column` apart and its rows `row`. The channels
// that come next are fetched: 36 streams are more than the processor follows by itself.
template <bool kRelu, class T, class Count>
static inline void transform(const T* x /* [6][6] */, int64_t row, int64_t column, float* v, int64_t point_stride,
                             Count lanes) {
  Float patch[kPoints], out[kPatch];
  for (int64_t j = 0; j < kPatch; ++j) {
    Float d[kPatch];
    for (int64_t i = 0; i < kPatch; ++i) {
      __builtin_prefetch(x + i * row + j * column + kLanes);
      const Float value = load(x + i * row + j * column, lanes);
      d[i] = kRelu ? relu(value) : value;
    }
    winograd_input(d, patch + j, 1, kPatch);
  }
  for (int64_t i = 0; i < kPatch; ++i) {
    winograd_input(patch + i * kPatch, out, 1, 1);
    for (int64_t j = 0; j < kPatch; ++j) store(v + (i * kPatch + j) * point_stride, out[j]);
  }
}

// One tile's patch, transformed, to v[point][c].
template <bool kRelu, class T>
static void transform_patch(const T* x /* [N, H, W, C] */, const Shape& s, const Tile& tile,
                            float* v /* [36][.][pitch] */, int64_t point_stride) {
  const int64_t top = tile.y - 1, left = tile.x - 1, row = s.w * s.c;
  const T* image = x + tile.n * s.h * row;
  if (top >= 0 && left >= 0 && top + kPatch <= s.h && left + kPatch <= s.w) {
    const T* first = image + top * row + left * s.c;
    for_channels(s.c,
                 [&](int64_t c, auto lanes) { transform<kRelu>(first + c, row, s.c, v + c, point_stride, lanes); });
    return;
  }
  for (int64_t begin = 0; begin < s.c; begin += kChunk) {  // a copy with zeros around the image
    float padded[kPoints * kChunk];
    const int64_t channels = smaller(kChunk, s.c - begin);
    for (int64_t i = 0; i < kPoints; ++i) {
      const int64_t y = top + i / kPatch, x = left + i % kPatch;
      const bool inside = y >= 0 && y < s.h && x >= 0 && x < s.w;
      const T* pixel = image + y * row + x * s.c + begin;
      for_channels(channels, [&](int64_t c, auto lanes) {
        store(padded + i * kChunk + c, inside ? load(pixel + c, lanes) : Float{});
      });
    }
    for (int64_t c = 0; c < channels; c += kLanes) {
      transform<kRelu>(padded + c, kPatch * kChunk, kChunk, v + begin + c, point_stride, Full{});
    }
  }
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
