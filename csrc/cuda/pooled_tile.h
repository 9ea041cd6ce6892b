// Tiles of 8 x 8 pixels whose input is pooled on the way in: what a block reads, and where it lies in shared memory.
// Pure functions of integers, for the kernel and, as plain C++, for csrc/tests.
#pragma once

#include "cuda/index.h"

namespace refinenet_fast::cuda {

constexpr int kTileEdge = 8, kTilePixels = kTileEdge * kTileEdge, kPoolRadius = 2;

// Of the convolution with kSide x kSide taps. Each pixel of one slice of channels has a slot of 64 bytes.
template <int kSide>
struct PooledTile {
  static constexpr int kPooled = kTileEdge + kSide - 1;   // pooled pixels along an edge, which the taps read
  static constexpr int kRaw = kPooled + 2 * kPoolRadius;  // pixels that are pooled for those
  static constexpr int kPitch = kRaw + 1;                 // slots from row to row: odd, so that two differ in banks
  static constexpr int kBytes = kRaw * kPitch * kNarrowRow;
  static constexpr int kSlices = kSide == 1 ? 3 : 2;  // in shared memory at once: 9 taps leave more time for the next
};

REFINENET_FAST_BOTH constexpr int64_t tiles_of(const Shape& s) {
  return s.n * blocks_of<int64_t>(s.h, kTileEdge) * blocks_of<int64_t>(s.w, kTileEdge);
}

// The first pixel of tile number `tile`; `down`, `across`: tiles of an image.
REFINENET_FAST_BOTH Pixel tile_at(int32_t tile, const Divider& down, const Divider& across) {
  const Pixel at = pixel_at(tile, down, across);
  return {at.image, at.row * kTileEdge, at.column * kTileEdge};
}

// `at`, or the nearest to it of 0 ... size - 1.
REFINENET_FAST_BOTH int32_t clamped(int32_t at, int32_t size) { return at < 0 ? 0 : at < size ? at : size - 1; }

// The number in memory of what lies at (row, column) of the kRaw x kRaw pixels. Outside of the image it is the nearest
// pixel inside. That one is in every window that reaches out to it, so the maxima stay what they are.
template <int kSide>
REFINENET_FAST_BOTH int32_t raw_pixel(const Pixel& first, int32_t row, int32_t column, int32_t h, int32_t w) {
  constexpr int32_t kBefore = kSide / 2 + kPoolRadius;
  return (first.image * h + clamped(first.row - kBefore + row, h)) * w + clamped(first.column - kBefore + column, w);
}

// The number in memory of a pixel of the tile; -1 where that is not one of the image, which may have no number at all.
REFINENET_FAST_BOTH int32_t number_of(const Pixel& at, int32_t h, int32_t w) {
  return at.row < h && at.column < w ? (at.image * h + at.row) * w + at.column : -1;
}

// Whether (row, column) of the kPooled x kPooled pixels is a pixel of the image; if not, taps read 0 there.
template <int kSide>
REFINENET_FAST_BOTH bool is_pooled(const Pixel& first, int32_t row, int32_t column, int32_t h, int32_t w) {
  return reads_inside({first.image, first.row + row, first.column + column}, {-(kSide / 2), -(kSide / 2)}, h, w);
}

template <int kSide>
REFINENET_FAST_BOTH uint32_t slot_of(uint32_t row, uint32_t column) {
  return row * PooledTile<kSide>::kPitch + column;
}

// The slot of what tap number `tap` of the tile's pixel `pixel` reads.
template <int kSide>
REFINENET_FAST_BOTH uint32_t slot_of_tap(uint32_t pixel, uint32_t tap) {
  return slot_of<kSide>(pixel / kTileEdge + tap / kSide, pixel % kTileEdge + tap % kSide);
}

}  // namespace refinenet_fast::cuda
