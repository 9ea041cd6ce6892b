// When a convolution takes the main loop for sm_90a, and in which tiles: pure functions of the request, in plain C++.
#pragma once

#include "cuda/plan.h"

namespace refinenet_fast::cuda::sm90 {

constexpr int kCapability = 90;  // what is built for sm_90a runs on compute capability 9.0 only
constexpr int kWarpgroup = 128, kConsumers = 2, kBlockThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kCluster = 2;  // blocks that share their tiles of weights

// A row of 8 pixels of 64 channels is one atom of the 128-byte swizzle, 1024 bytes: boxes of such rows begin at
// multiples of it wherever a tap begins to read, so that the rows above and below cost no load of their own.
constexpr int kTileColumns = 8, kGroupRows = 8, kTileRows = kConsumers * kGroupRows;
constexpr int kSlice = 64;       // input channels of a step
constexpr int kFewestSteps = 4;  // of a split
constexpr int kRowBytes = kSlice * 2, kAtomBytes = kTileColumns * kRowBytes;
constexpr int kBoxBytes = (kTileRows + 2) * kAtomBytes;  // 18,432: pixels of one slice, shifted by one dx, for every dy

// The way out goes through shared memory by warps, 16 pixels x 32 output channels of float32 at a time.
constexpr int kOutSlice = 32, kWarpPixels = 16;
constexpr int kWarpBytes = kWarpPixels * pitch_of(kOutSlice) * static_cast<int>(sizeof(float));
constexpr int kOutBytes = kConsumers * 4 * kWarpBytes;

// Whether the sums are all there, and their way out reads no other map: what it adds is in registers, and TMA stores
// the rest.
REFINENET_FAST_BOTH constexpr bool is_plain(const PackedConvolution& p) {
  return p.splits <= 1 && !p.out.select && !p.out.low && p.out.adds == 0;
}

constexpr int kMostShared = 232448;  // of a block

// How many boxes of pixels and tiles of weights are on their way at once. A box of 3x3 serves three tiles of weights,
// hence fewer of them; a box of 1x1 serves one.
//
//   outputs   boxes          weights           way out   barriers   to align   together
//   256       4 x 18,432     4 x 32,768         20,480        128      1,024    226,432
//   128       5 x 18,432     7 x 16,384         20,480        192      1,024    228,544
//    64       7 x 18,432     9 x  8,192         20,480        256      1,024    224,512
struct Stages {
  int boxes, weights;
};

REFINENET_FAST_BOTH constexpr Stages stages_of(int outs) {
  return outs == 256 ? Stages{4, 4} : outs == 128 ? Stages{5, 7} : Stages{7, 9};
}

constexpr int shared_bytes(int outs) {
  const Stages stages = stages_of(outs);
  const int tiles = stages.boxes * kBoxBytes + stages.weights * outs * kRowBytes;
  return kAtomBytes + tiles + kOutBytes + 2 * 8 * (stages.boxes + stages.weights);
}
static_assert(shared_bytes(256) <= kMostShared && shared_bytes(128) <= kMostShared && shared_bytes(64) <= kMostShared,
              "a block's shared memory");

struct Plan {
  int outs;        // output channels of a tile, 256, 128 or 64; 0: the other loop takes this
  int64_t blocks;  // that stay, taking one tile after the other
  int shared_bytes;
  int splits;     // of the input channels
  int64_t parts;  // floats for all of these
};

// Clusters' worth of tiles of pixels.
REFINENET_FAST_BOTH constexpr int64_t pixel_groups(const Shape& s) {
  return blocks_of<int64_t>(s.n * blocks_of<int64_t>(s.h, kTileRows) * blocks_of<int64_t>(s.w, kTileColumns), kCluster);
}

// The order in which tiles are computed: all output channels of some pixels, then the next ones. A cluster's blocks
// take neighbouring pixels, the same output channels, and equally many tiles: where pixels run out, one beyond the last
// image. Where input channels are split, all that for the first slices, then for the next ones.
struct TileOrder {
  int32_t down, across;  // tiles of an image
  int32_t width, outs;   // output channels of a tile, and tiles of them
  int32_t count;         // clusters' worth of tiles, for each split
};

REFINENET_FAST_BOTH TileOrder tile_order(const PackedConvolution& p, int32_t width) {
  const int32_t down = blocks_of<int32_t>(p.shape.h, kTileRows), across = blocks_of<int32_t>(p.shape.w, kTileColumns);
  const int32_t outs = blocks_of<int32_t>(p.k, width);
  return {down, across, width, outs, static_cast<int32_t>(pixel_groups(p.shape)) * outs};
}

struct SplitTile {
  Pixel first;    // pixel
  int32_t out;    // the first output channel
  int32_t split;  // of the input channels
};

// What block `rank` of a cluster computes of its tiles number `number`.
REFINENET_FAST_BOTH SplitTile tile_at(const TileOrder& order, int32_t number, int32_t rank) {
  const int32_t split = number / order.count, own = number - split * order.count;
  const int32_t tile = own / order.outs * kCluster + rank, line = tile / order.across;
  return {{line / order.down, line % order.down * kTileRows, tile % order.across * kTileColumns},
          own % order.outs * order.width,
          split};
}

// Tensor maps want rows of whole chunks at aligned addresses, and strides below 2^40 bytes.
inline bool takes(const PackedConvolution& p, int capability) {
  if (capability != kCapability || p.sm80_loop || p.pool_in || p.dtype == DType::kFloat32) return false;
  if (piece_of(p.dtype, {p.shape.c}, {p.x, p.weights}) < kChunkBytes || !whole_out(p)) return false;
  const int64_t image = p.shape.h * p.shape.w * p.shape.c, tap = p.k * p.shape.c, most = int64_t{1} << 39;
  return image < most && tap < most && pixel_groups(p.shape) <= kMostCounted / kCluster / blocks_of<int64_t>(p.k, 64);
}

// As wide as the output channels, so that pixels are read once; narrower where there would be fewer tiles than
// multiprocessors, and split over input channels where even narrow ones are fewer. Narrow tiles come first: they read
// shared memory more often, and splits write, read and add float32 sums in a launch of their own. Predicted in
// thousands of cycles, on 132 multiprocessors, for 3x3; in brackets the splits that give each multiprocessor one tile
// at most:
//   outputs                          64        128        256
//   512 -> 512, 8 x 16 x 16       28 (1)     30 (2)     34 (4)
//   256 -> 256, 1 x 64 x 64       15 (1)     20 (2)     24 (4)
//   256 -> 256, 1 x 32 x 32       10 (4)     12 (4)     16 (4)
// A step of 64 channels keeps the tensor cores busy for 4 cycles an output, shared memory for 3 and 176 besides: the
// longer counts. A tile takes 1.5 thousand to fill the ring; sums move 8 bytes each, 24 a cycle and multiprocessor, and
// their launch takes 3 thousand.
inline Plan plan(const PackedConvolution& p, int capability, int processors) {
  if (!takes(p, capability)) return {};
  const auto blocks = [&](int outs) { return kCluster * pixel_groups(p.shape) * blocks_of<int64_t>(p.k, outs); };
  int outs = 256;
  while (outs > 64 && (p.k <= outs / 2 || blocks(outs) < processors)) outs /= 2;
  if (p.tile == 256 || p.tile == 128 || p.tile == 64) outs = p.tile;
  const int64_t room = processors > kCluster ? processors / kCluster * kCluster : kCluster;
  const int64_t slices = blocks_of<int64_t>(p.shape.c, kSlice);
  const int splits = splits_of(p, blocks(outs), slices, processors, 1, kFewestSteps);
  const int64_t all = blocks(outs) * splits;
  return {outs, all < room ? all : room, shared_bytes(outs), splits, parts_of(p, splits)};
}

}  // namespace refinenet_fast::cuda::sm90
