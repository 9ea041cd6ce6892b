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

// Where the pixels around a tile are in x, from `before` rows and columns before its first one: -1 outside the image.
static inline void locate(const Shape& s, const Tile& tile, int64_t side, int64_t before,
                          int64_t* at /* [side * side] */) {
  for (int64_t i = 0; i < side * side; ++i) {
    const int64_t row = tile.y - before + i / side, column = tile.x - before + i % side;
    const bool inside = row >= 0 && row < s.h && column >= 0 && column < s.w;
    at[i] = inside ? ((tile.n * s.h + row) * s.w + column) * s.c : -1;
  }
}

// A patch of some channels, transformed, to v[point].
static inline void transform(Float* patch /* [36] */, float* v, int64_t point_stride) {
  for (int64_t j = 0; j < kPatch; ++j) winograd_input(patch + j, patch + j, kPatch);
  for (int64_t i = 0; i < kPatch; ++i) {
    winograd_input(patch + i * kPatch, patch + i * kPatch, 1);
    for (int64_t j = 0; j < kPatch; ++j) store(v + (i * kPatch + j) * point_stride, patch[i * kPatch + j]);
  }
}

// One tile's patch, transformed, to v[point][c].
template <bool kRelu, class T>
static void transform_patch(const T* x /* [N, H, W, C] */, const Shape& s, const Tile& tile,
                            float* v /* [36][.][pitch] */, int64_t point_stride) {
  int64_t at[kPoints];
  locate(s, tile, kPatch, 1, at);
  for_channels(s.c, [&](int64_t c, auto lanes) {
    Float patch[kPoints];
    for (int64_t i = 0; i < kPoints; ++i) {
      const Float value = at[i] < 0 ? Float{} : load(x + at[i] + c, lanes);
      patch[i] = kRelu ? relu(value) : value;
    }
    transform(patch, v + c, point_stride);
  });
}

constexpr int64_t kPool = 5;                   // of a side of the pool's window
constexpr int64_t kHalo = kPatch + kPool - 1;  // inputs of a pooled patch along a side

struct Largest {
  static Float of(Float a, Float b) { return max(a, b); }
};
struct LargestOrNaN {
  static Float of(Float a, Float b) { return select((b > a) | (b != b), b, a); }
};

// Maxima of five in a row, at each of six places; elements of `a` are `from` apart, of `out` `to`.
template <class Combine>
static inline void maxima_of_five(const Float* a /* [10] */, int64_t from, Float* out /* [6] */, int64_t to) {
  Float pairs[kHalo - 1];
  for (int64_t i = 0; i < kHalo - 1; ++i) pairs[i] = Combine::of(a[i * from], a[(i + 1) * from]);
  for (int64_t i = 0; i < kPatch; ++i) {
    out[i * to] = Combine::of(Combine::of(pairs[i], pairs[i + 2]), a[(i + 4) * from]);
  }
}

template <class Combine>
static inline void pool_patch(const Float* raw /* [10 * 10] */, Float* patch /* [36] */) {
  Float rows[kHalo * kPatch];
  for (int64_t i = 0; i < kHalo; ++i) maxima_of_five<Combine>(raw + i * kHalo, 1, rows + i * kPatch, 1);
  for (int64_t j = 0; j < kPatch; ++j) maxima_of_five<Combine>(rows + j, kPatch, patch + j, kPatch);
}

// The same of the 5x5 max pool of x; pooled pixels outside the image are 0, as the convolution pads.
template <bool kRelu, class T>
static void transform_pooled_patch(const T* x /* [N, H, W, C] */, const Shape& s, const Tile& tile,
                                   float* v /* [36][.][pitch] */, int64_t point_stride) {
  int64_t at[kHalo * kHalo], pooled[kPoints];
  locate(s, tile, kHalo, 1 + kPool / 2, at);
  locate(s, tile, kPatch, 1, pooled);
  for_channels(s.c, [&](int64_t c, auto lanes) {
    Float raw[kHalo * kHalo], patch[kPoints];
    Int nan{};
    for (int64_t i = 0; i < kHalo * kHalo; ++i) {
      raw[i] = at[i] < 0 ? splat(-__builtin_inff()) : load(x + at[i] + c, lanes);
      nan |= raw[i] != raw[i];
    }
    any(nan) ? pool_patch<LargestOrNaN>(raw, patch) : pool_patch<Largest>(raw, patch);
    for (int64_t i = 0; i < kPoints; ++i) {
      if (pooled[i] < 0) patch[i] = Float{};
      if (kRelu) patch[i] = relu(patch[i]);
    }
    transform(patch, v + c, point_stride);
  });
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
