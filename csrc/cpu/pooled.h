// A 5x5 max pool's result for a convolution's input, never in memory as a whole.
//
// Of a few channels at a time it is computed for a band of six rows, down each column first, then along the rows in
// place, so that neighbouring pixels share their windows.
#pragma once

#include "common/arguments.h"
#include "cpu/simd.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {

constexpr int64_t kPool = 5;                   // of a side of the window
constexpr int64_t kBand = 6;                   // rows of pooled pixels
constexpr int64_t kReach = kBand + kPool - 1;  // rows of inputs that those read
constexpr int64_t kPoolChunk = 32;             // channels

struct Largest {
  static Float of(Float a, Float b) { return max(a, b); }
};
struct LargestOrNaN {
  static Float of(Float a, Float b) { return select((b > a) | (b != b), b, a); }
};

// Pooled pixels of image n: six rows from `top` and some columns from `left` on, which may be outside of it.
struct Band {
  int64_t n, top, left, columns;

  int64_t inputs() const { return columns + kPool - 1; }  // columns that those read
  int64_t elements() const { return kBand * inputs() * kPoolChunk; }
};

// Maxima of five in a row, at each of six places.
template <class Combine>
static inline void maxima_of_five(const Float* a /* [10] */, float* out, int64_t stride) {
  Float pairs[kReach - 1];
  for (int64_t i = 0; i < kReach - 1; ++i) pairs[i] = Combine::of(a[i], a[i + 1]);
  for (int64_t i = 0; i < kBand; ++i) {
    store(out + i * stride, Combine::of(Combine::of(pairs[i], pairs[i + 2]), a[i + 4]));
  }
}

// Maxima of five along a row, in place: `columns` of them from 4 more.
template <class Combine>
static void pool_row(float* a /* [columns + 4][kPoolChunk] */, int64_t columns) {
  const Float a0 = load(a), a1 = load(a + kPoolChunk), a2 = load(a + 2 * kPoolChunk);
  Float last = load(a + 3 * kPoolChunk);
  Float p0 = Combine::of(a0, a1), p1 = Combine::of(a1, a2), p2 = Combine::of(a2, last);  // maxima of two
  for (int64_t j = 0; j < columns; ++j, a += kPoolChunk) {
    const Float next = load(a + 4 * kPoolChunk);
    store(a, Combine::of(Combine::of(p0, p2), next));
    p0 = p1;
    p1 = p2;
    p2 = Combine::of(last, next);
    last = next;
  }
}

// One column of the column pass for a vector of channels; whether there is a NaN in it.
template <class T, class Count, class Inside>
static inline Int pool_column(const T* x /* [10] */, int64_t row, float* out /* [6] */, int64_t stride, Count lanes,
                              const Inside& inside) {
  Float a[kReach];
  Int nan{};
  for (int64_t i = 0; i < kReach; ++i) {
    if (inside(i)) __builtin_prefetch(x + i * row + kPoolChunk, 0, 2);
    a[i] = inside(i) ? load(x + i * row, lanes) : splat(-__builtin_inff());
    nan |= a[i] != a[i];
  }
  any(nan) ? maxima_of_five<LargestOrNaN>(a, out, stride) : maxima_of_five<Largest>(a, out, stride);
  return nan;
}

// The column pass for a vector of channels; whether there is a NaN among them.
template <class T, class Count>
static inline bool pool_columns(const T* x /* [H, W, C] */, const Shape& s, const Band& band, int64_t c,
                                float* out /* [6][inputs][kPoolChunk] */, Count lanes) {
  const int64_t top = band.top - kPool / 2, left = band.left - kPool / 2, row = s.w * s.c;
  const int64_t stride = band.inputs() * kPoolChunk;
  const bool whole = top >= 0 && top + kReach <= s.h;
  Int nans{};
  for (int64_t j = 0; j < band.inputs(); ++j) {
    const int64_t column = left + j;
    const T* from = x + top * row + column * s.c + c;
    float* to = out + j * kPoolChunk;
    if (column < 0 || column >= s.w) {
      for (int64_t i = 0; i < kBand; ++i) store(to + i * stride, splat(-__builtin_inff()));
    } else if (whole) {
      nans |= pool_column(from, row, to, stride, lanes, [](int64_t) { return true; });
    } else {
      nans |= pool_column(from, row, to, stride, lanes, [&](int64_t i) { return top + i >= 0 && top + i < s.h; });
    }
  }
  return any(nans);
}

// kPoolChunk channels from `begin` on, or as many as there are; pixels outside the image are 0, as a convolution pads.
template <class T>
static void pool_band(const T* x /* [N, H, W, C] */, const Shape& s, const Band& band, int64_t begin,
                      float* pooled /* [6][inputs][kPoolChunk] */) {
  const T* image = x + band.n * s.h * s.w * s.c;
  const int64_t row = band.inputs() * kPoolChunk;
  for_channels(smaller(kPoolChunk, s.c - begin), [&](int64_t c, auto lanes) {
    const bool nan = pool_columns(image, s, band, begin + c, pooled + c, lanes);
    for (int64_t i = 0; i < kBand; ++i) {
      nan ? pool_row<LargestOrNaN>(pooled + i * row + c, band.columns)
          : pool_row<Largest>(pooled + i * row + c, band.columns);
    }
  });
  for (int64_t i = 0; i < kBand; ++i) {
    for (int64_t j = 0; j < band.columns; ++j) {
      const int64_t y = band.top + i, column = band.left + j;
      if (y >= 0 && y < s.h && column >= 0 && column < s.w) continue;
      for (int64_t c = 0; c < kPoolChunk; c += kLanes) store(pooled + i * row + j * kPoolChunk + c, Float{});
    }
  }
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
