// Tiles that pool on the way in, which are plain C++: against the definition of a 5x5 max pool with padding 2, for maps
// smaller and larger than a tile; and where they lie in shared memory.
#include <limits>
#include <set>

#include "cuda/plan.h"
#include "plain_check.h"

using namespace refinenet_fast;
using namespace refinenet_fast::cuda;
using refinenet_fast::test::check;
using refinenet_fast::test::failures;

namespace {

// The pixels of image `image` that the pool at (row, column) is of.
std::set<int32_t> window(int32_t image, int32_t row, int32_t column, int32_t h, int32_t w) {
  std::set<int32_t> found;
  for (int32_t y = row - 2; y <= row + 2; ++y) {
    for (int32_t x = column - 2; x <= column + 2; ++x) {
      if (y >= 0 && y < h && x >= 0 && x < w) found.insert((image * h + y) * w + x);
    }
  }
  return found;
}

// Every pixel is in one tile, and what its taps find in shared memory is what the tile's threads pool there.
template <int kSide>
void pooled_pixels(int32_t n, int32_t h, int32_t w) {
  const Divider down = divider((h + 7) / 8), across = divider((w + 7) / 8);
  std::set<int32_t> pixels;
  for (int32_t tile = 0; tile < tiles_of({n, h, w, 1}); ++tile) {
    const Pixel first = tile_at(tile, down, across);
    check(first.image < n && first.row < h && first.column < w, "a tile's first pixel", tile);
    for (uint32_t pixel = 0; pixel < 64; ++pixel) {
      const int32_t row = first.row + pixel / 8, column = first.column + pixel % 8;
      const int32_t number = number_of({first.image, row, column}, h, w);
      check((number >= 0) == (row < h && column < w), "a pixel of the image", row, column);
      if (number < 0) continue;
      check(number == (first.image * h + row) * w + column, "a pixel's number", row, column);
      pixels.insert(number);
      for (uint32_t tap = 0; tap < kSide * kSide; ++tap) {
        const Tap shift = tap_at(tap, kSide);
        const uint32_t slot = slot_of_tap<kSide>(pixel, tap);
        const int32_t y = slot / PooledTile<kSide>::kPitch, x = slot % PooledTile<kSide>::kPitch;
        const bool inside = reads_inside({first.image, row, column}, shift, h, w);
        check(y < PooledTile<kSide>::kPooled && x < PooledTile<kSide>::kPooled, "a pooled pixel", y, x);
        check(is_pooled<kSide>(first, y, x, h, w) == inside, "inside the image", row, column);
        std::set<int32_t> read;
        for (int32_t i = 0; i < 25; ++i) read.insert(raw_pixel<kSide>(first, y + i / 5, x + i % 5, h, w));
        const bool same = read == window(first.image, row + shift.dy, column + shift.dx, h, w);
        check(same || !inside, "the window", row, column);
        check(*read.begin() >= 0 && *read.rbegin() < n * h * w, "inside of memory", row, column);
      }
    }
  }
  check(static_cast<int32_t>(pixels.size()) == n * h * w, "every pixel", h, w);
}

// Of sizes near the most that are taken, pixels beyond the image have numbers beyond 2^31.
void largest() {
  const int32_t w = std::numeric_limits<int32_t>::max() - 200, tall = (1 << 15) - 1, wide = 1 << 16;
  check(refusal({1, 1, w, 8}, 8, true) == nullptr && refusal({1, tall, wide, 8}, 8, true) == nullptr, "taken");
  check(number_of({0, 0, w - 1}, 1, w) == w - 1, "the last pixel of a line");
  for (int32_t row = 0; row < 8; ++row) {
    for (int32_t column = w - w % 8; column < w - w % 8 + 8; ++column) {
      check((number_of({0, row, column}, 1, w) >= 0) == (row == 0 && column < w), "one line", row, column);
    }
    check((number_of({0, tall - 7 + row, wide - 1}, tall, wide) >= 0) == (row < 7), "a map", row);
  }
}

// Each chunk has a place of its own. What threads touch at once lies in different banks: two rows' or two columns'
// slots of 64 bytes, each turn of eight pixels that ldmatrix reads.
template <int kSide>
void places() {
  using Geometry = PooledTile<kSide>;
  std::set<uint32_t> found;
  for (uint32_t row = 0; row < Geometry::kRaw; ++row) {
    for (uint32_t column = 0; column < Geometry::kRaw; ++column) {
      for (uint32_t chunk = 0; chunk < 4; ++chunk) found.insert(narrow_chunk(slot_of<kSide>(row, column), chunk));
      const uint32_t half = slot_of<kSide>(row, column) % 2;
      check(half != slot_of<kSide>(row + 1, column) % 2 && half != slot_of<kSide>(row, column + 1) % 2, "halves", row);
    }
  }
  check(found.size() == 4 * Geometry::kRaw * Geometry::kRaw, "places", kSide);
  check(*found.rbegin() < Geometry::kBytes && Geometry::kBytes % 128 == 0, "bytes", *found.rbegin());
  for (uint32_t tap = 0; tap < kSide * kSide; ++tap) {
    for (uint32_t pixel = 0; pixel < 64; pixel += 8) {
      std::set<uint32_t> banks;
      for (uint32_t i = 0; i < 8; ++i) banks.insert(narrow_chunk(slot_of_tap<kSide>(pixel + i, tap), 1) / 16 % 8);
      check(banks.size() == 8, "banks", pixel, tap);
    }
  }
}

PackedConvolution convolution(const Shape& shape, int64_t k, int side) {
  PackedConvolution p{};
  p.x = reinterpret_cast<const void*>(256);
  p.shape = shape;
  p.k = k;
  p.side = side;
  p.dtype = DType::kBFloat16;
  p.pool_in = true;
  return p;
}

void plans() {
  for (const int side : {1, 3}) {
    const Plan typical = plan(convolution({8, 128, 128, 256}, 256, side), 132);
    check(typical.tile == kWide && typical.blocks == 8 * 16 * 16 && typical.piece == 16, "typical", typical.blocks);
    check((typical.shared_bytes + 1024) * kResident <= 164 << 10, "two on sm_80", typical.shared_bytes);
    const Plan few = plan(convolution({1, 16, 16, 512}, 512, side), 132);
    check(few.tile == kSmall && few.blocks == 4 * 8, "few tiles", few.blocks);
    PackedConvolution exact = convolution({8, 128, 128, 256}, 256, side);
    exact.exact = true;
    check(plan(exact, 132).tile == kSmall, "three products");
  }
  const int64_t billion = 1 << 30;
  check(refusal({billion, 1, 1, 1}, 64 * 3) == nullptr, "few blocks of pixels in turn");
  check(refusal({billion, 1, 1, 1}, 64 * 3, true) != nullptr, "a tile for each pixel");
}

}  // namespace

int main() {
  for (const int32_t h : {1, 2, 5, 8, 17}) {
    for (const int32_t w : {1, 3, 7, 9, 16}) {
      pooled_pixels<1>(2, h, w);
      pooled_pixels<3>(2, h, w);
    }
  }
  largest();
  places<1>();
  places<3>();
  plans();
  std::printf("%d failed\n", failures);
  return failures != 0;
}
