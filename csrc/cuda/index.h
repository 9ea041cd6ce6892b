// Where things lie: pixels and taps, tiles, chunks in shared memory. Pure functions of integers, for the kernels and,
// as plain C++, for csrc/tests.
#pragma once

#include <cstdint>

#include "common/arguments.h"

namespace refinenet_fast::cuda {

constexpr int kChunkBytes = 16;  // of one copy, and of a matrix's row in ldmatrix

template <class Integer>
REFINENET_FAST_BOTH constexpr Integer blocks_of(Integer size, Integer block) {
  return (size + block - 1) / block;
}

REFINENET_FAST_BOTH constexpr int64_t pixels_of(const Shape& s) { return s.n * s.h * s.w; }

// ---- Pixels ---------------------------------------------------------------------------------------------------------

// Division by a number that the host knows: one multiplication and a shift. Exact for 0 <= n < 2^31.
struct Divider {
  uint32_t by, factor, shift;
};

// factor = ceil(2^(31 + bits) / by), 2^bits >= by: too large by less than 1 part in 2^31, which no n below 2^31 shows.
REFINENET_FAST_BOTH Divider divider(int32_t by) {
  uint32_t bits = 0;
  while ((int64_t{1} << bits) < by) ++bits;
  const uint64_t power = uint64_t{1} << (31 + bits);
  return {static_cast<uint32_t>(by), static_cast<uint32_t>((power + by - 1) / by), 31 + bits};
}

REFINENET_FAST_BOTH int32_t operator/(int32_t n, const Divider& d) {
  return static_cast<int32_t>(static_cast<uint64_t>(n) * d.factor >> d.shift);
}

struct Pixel {
  int32_t image, row, column;
};

// Of the pixel with number `pixel` in memory.
REFINENET_FAST_BOTH Pixel pixel_at(int32_t pixel, const Divider& h, const Divider& w) {
  const int32_t line = pixel / w, image = line / h;
  return {image, line - image * static_cast<int32_t>(h.by), pixel - line * static_cast<int32_t>(w.by)};
}

// ---- Taps: number t of a kernel of side r reads the pixel (t / r - r / 2, t % r - r / 2) further
// ----------------------

struct Tap {
  int32_t dy, dx;
};

REFINENET_FAST_BOTH Tap tap_at(int32_t tap, int32_t side) { return {tap / side - side / 2, tap % side - side / 2}; }

REFINENET_FAST_BOTH bool reads_inside(const Pixel& at, const Tap& tap, int32_t h, int32_t w) {
  const int32_t row = at.row + tap.dy, column = at.column + tap.dx;
  return row >= 0 && row < h && column >= 0 && column < w;
}

// Bit t: whether tap t reads inside the image.
REFINENET_FAST_BOTH uint32_t taps_inside(const Pixel& at, int32_t side, int32_t h, int32_t w) {
  uint32_t bits = 0;
  for (int32_t tap = 0; tap < side * side; ++tap) {
    bits |= static_cast<uint32_t>(reads_inside(at, tap_at(tap, side), h, w)) << tap;
  }
  return bits;
}

// How many elements of a vector of `lanes` there are from `channel` on, of `channels`.
REFINENET_FAST_BOTH int32_t lanes_left(int32_t channel, int32_t channels, int32_t lanes) {
  const int32_t left = channels - channel;
  return left < 0 ? 0 : left < lanes ? left : lanes;
}

// ---- Chunks of 16 bytes in shared memory
// -----------------------------------------------------------------------------

// Of rows of 64 bytes. Eight rows that ldmatrix reads are 4 lines of 32 banks; turning the chunks of each line by its
// number puts all eight into different banks.
constexpr int kNarrowRow = 64;

REFINENET_FAST_BOTH uint32_t narrow_chunk(uint32_t row, uint32_t chunk) {
  return row * kNarrowRow + (chunk ^ (row >> 1 & 3)) * kChunkBytes;
}

// Of rows of kRowBytes, a multiple of 128, one a pixel. Eight pixels that ldmatrix transposes get the eight turns of a
// line of banks; four pixels that lanes read word by word, two chunks of each, the even or the odd ones.
template <int kRowBytes>
REFINENET_FAST_BOTH uint32_t wide_chunk(uint32_t pixel, uint32_t chunk) {
  static_assert(kRowBytes % 128 == 0, "a row is whole lines of banks");
  return pixel * kRowBytes + (chunk ^ ((pixel & 3) << 1 | (pixel >> 2 & 1))) * kChunkBytes;
}

// Floats from row to row of a tile of sums: where lanes of one quarter of a warp write, rows are in different banks.
REFINENET_FAST_BOTH constexpr int pitch_of(int tile) { return tile + 8; }

// ---- Splits
// ----------------------------------------------------------------------------------------------------------

// Where split number `split` of `splits` begins, of `steps`; shares differ by one step at most.
REFINENET_FAST_BOTH int32_t split_begin(int32_t steps, int32_t split, int32_t splits) {
  const int32_t extra = steps % splits;
  return split * (steps / splits) + (split < extra ? split : extra);
}

}  // namespace refinenet_fast::cuda
