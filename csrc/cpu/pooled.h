// Patches of a 5x5 max pool's result, transformed, without the result ever being in memory.
//
// Neighbouring tiles of a row share their halo: of a few channels at a time the pool is computed once for all of them,
// down each column first, then along the rows in place.
#pragma once

#include "cpu/patches.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {

constexpr int64_t kPool = 5;                   // of a side of the window
constexpr int64_t kHalo = kPatch + kPool - 1;  // inputs along a side of a pooled patch
constexpr int64_t kPoolChunk = 32;             // channels that are pooled at a time

struct Largest {
  static Float of(Float a, Float b) { return max(a, b); }
};
struct LargestOrNaN {
  static Float of(Float a, Float b) { return select((b > a) | (b != b), b, a); }
};

// Neighbouring tiles of a row, from `first` on.
struct Run {
  Tile first;
  int64_t tiles;

  int64_t columns() const { return tiles * kTile + kPatch - kTile; }  // of pooled pixels
  int64_t inputs() const { return columns() + kPool - 1; }            // columns that those read
};

// Elements of pooled() for a run of so many tiles.
static inline int64_t pooled_elements(int64_t tiles) { return kPatch * Run{{}, tiles}.inputs() * kPoolChunk; }

// Maxima of five inputs in a column, at each of six places.
template <class Combine>
static inline void pool_column(const Float* a /* [10] */, float* out, int64_t stride) {
  Float pairs[kHalo - 1];
  for (int64_t i = 0; i < kHalo - 1; ++i) pairs[i] = Combine::of(a[i], a[i + 1]);
  for (int64_t i = 0; i < kPatch; ++i) {
    store(out + i * stride, Combine::of(Combine::of(pairs[i], pairs[i + 2]), a[i + 4]));
  }
}

// Maxima of five along a row, in place: `columns` of them from 4 more. Places outside the image are 0.
template <class Combine>
static void pool_row(float* a /* [columns + 4][kPoolChunk] */, int64_t columns) {
  Float a1 = load(a), a2 = load(a + kPoolChunk), a3 = load(a + 2 * kPoolChunk), a4 = load(a + 3 * kPoolChunk);
  Float p0 = Combine::of(a1, a2), p1 = Combine::of(a2, a3), p2 = Combine::of(a3, a4);
  for (int64_t j = 0; j < columns; ++j, a += kPoolChunk) {
    const Float next = load(a + 4 * kPoolChunk);
    store(a, Combine::of(Combine::of(p0, p2), next));
    p0 = p1, p1 = p2, p2 = Combine::of(a4, next), a4 = next;
  }
}

// The pool's columns for some channels; whether there is a NaN among them.
template <class T, class Count>
static inline bool pool_columns(const T* x /* [H, W, C] */, const Shape& s, const Run& run, int64_t c,
                                float* out /* [6][inputs][kPoolChunk] */, Count lanes) {
  const int64_t top = run.first.y - 1 - kPool / 2, left = run.first.x - 1 - kPool / 2, inputs = run.inputs();
  const Float outside = splat(-__builtin_inff());
  Int nans{};
  for (int64_t j = 0; j < inputs; ++j) {
    const int64_t column = left + j;
    Float a[kHalo];
    Int nan{};
    for (int64_t i = 0; i < kHalo; ++i) {
      const int64_t row = top + i;
      const bool inside = row >= 0 && row < s.h && column >= 0 && column < s.w;
      a[i] = inside ? load(x + (row * s.w + column) * s.c + c, lanes) : outside;
      nan |= a[i] != a[i];
    }
    any(nan) ? pool_column<LargestOrNaN>(a, out + j * kPoolChunk, inputs * kPoolChunk)
             : pool_column<Largest>(a, out + j * kPoolChunk, inputs * kPoolChunk);
    nans |= nan;
  }
  return any(nans);
}

// Rows and columns outside the image are 0, as the convolution pads.
static inline void clear_outside(const Shape& s, const Run& run, float* pooled /* [6][inputs][kPoolChunk] */) {
  for (int64_t i = 0; i < kPatch; ++i) {
    for (int64_t j = 0; j < run.columns(); ++j) {
      const int64_t row = run.first.y - 1 + i, column = run.first.x - 1 + j;
      if (row >= 0 && row < s.h && column >= 0 && column < s.w) continue;
      float* pixel = pooled + (i * run.inputs() + j) * kPoolChunk;
      for (int64_t c = 0; c < kPoolChunk; c += kLanes) store(pixel + c, Float{});
    }
  }
}

// The patches of a run, pooled and transformed, to v[point][tile][c].
template <bool kRelu, class T>
static void transform_pooled_run(const T* x /* [N, H, W, C] */, const Shape& s, const Run& run,
                                 float* v /* [36][.][pitch] */, int64_t pitch, int64_t point_stride,
                                 float* pooled /* [pooled_elements] */) {
  const T* image = x + run.first.n * s.h * s.w * s.c;
  const int64_t row = run.inputs() * kPoolChunk;
  for (int64_t begin = 0; begin < s.c; begin += kPoolChunk) {
    const int64_t channels = smaller(kPoolChunk, s.c - begin);
    for_channels(channels, [&](int64_t c, auto lanes) {
      const bool nan = pool_columns(image, s, run, begin + c, pooled + c, lanes);
      for (int64_t i = 0; i < kPatch; ++i) {
        nan ? pool_row<LargestOrNaN>(pooled + i * row + c, run.columns())
            : pool_row<Largest>(pooled + i * row + c, run.columns());
      }
    });
    clear_outside(s, run, pooled);
    for (int64_t t = 0; t < run.tiles; ++t) {
      for (int64_t c = 0; c < channels; c += kLanes) {
        transform<kRelu>(pooled + t * kTile * kPoolChunk + c, row, kPoolChunk, v + t * pitch + begin + c, point_stride,
                         Full{});
      }
    }
  }
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
