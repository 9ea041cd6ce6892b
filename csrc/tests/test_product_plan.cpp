// Index functions and plans of the CUDA products, which are plain C++: against their definitions, at the ends of their
// ranges too.
#include <array>
#include <limits>
#include <set>

#include "cuda/plan_sm90.h"
#include "plain_check.h"

using namespace refinenet_fast;
using namespace refinenet_fast::cuda;
using refinenet_fast::test::check;
using refinenet_fast::test::failures;

namespace {

void divisions() {
  const int32_t most = std::numeric_limits<int32_t>::max();
  for (const int32_t by :
       {1, 2, 3, 5, 7, 17, 127, 128, 255, 641, 65535, 65537, 1 << 30, (1 << 30) + 1, most - 1, most}) {
    const Divider d = divider(by);
    for (int64_t near = 0; near <= most; near += by > 1 << 16 ? by : int64_t{by} * (most / by / 1000 + 1)) {
      for (int64_t n = near - 2; n <= near + 2; ++n) {
        if (n >= 0 && n <= most) check(static_cast<int32_t>(n) / d == n / by, "quotient", n, by);
      }
    }
    check(most / d == most / by, "quotient of the largest", most, by);
  }
}

void pixels() {
  const int32_t n = 3, h = 5, w = 7;
  int32_t number = 0;
  for (int32_t image = 0; image < n; ++image) {
    for (int32_t row = 0; row < h; ++row) {
      for (int32_t column = 0; column < w; ++column, ++number) {
        const Pixel at = pixel_at(number, divider(h), divider(w));
        check(at.image == image && at.row == row && at.column == column, "pixel", number);
        for (const int32_t side : {1, 3}) {
          const uint32_t bits = taps_inside(at, side, h, w);
          for (int32_t t = 0; t < side * side; ++t) {
            const int32_t y = row + t / side - side / 2, x = column + t % side - side / 2;
            check((bits >> t & 1) == (y >= 0 && y < h && x >= 0 && x < w), "tap", number, t);
          }
        }
      }
    }
  }
}

// Each chunk has a place of its own, and what a warp reads at once lies in different banks.
template <int kRowBytes>
void wide_rows() {
  std::set<uint32_t> places;
  for (uint32_t pixel = 0; pixel < 32; ++pixel) {
    for (uint32_t chunk = 0; chunk < kRowBytes / 16; ++chunk) places.insert(wide_chunk<kRowBytes>(pixel, chunk));
  }
  check(places.size() == 32 * kRowBytes / 16 && *places.rbegin() < 32 * kRowBytes, "places in wide rows", kRowBytes);
  for (uint32_t first = 0; first < 32; first += 8) {
    std::set<uint32_t> columns, words;
    for (uint32_t i = 0; i < 8; ++i) columns.insert(wide_chunk<kRowBytes>(first + i, 5) / 16 % 8);
    for (uint32_t i = 0; i < 4; ++i) {
      for (uint32_t chunk : {2, 3}) words.insert(wide_chunk<kRowBytes>(first + i, chunk) / 16 % 8);
    }
    check(columns.size() == 8 && words.size() == 8, "banks of wide rows", kRowBytes, first);
  }
}

void narrow_rows() {
  std::set<uint32_t> places;
  for (uint32_t row = 0; row < 128; ++row) {
    for (uint32_t chunk = 0; chunk < 4; ++chunk) places.insert(narrow_chunk(row, chunk));
  }
  check(places.size() == 512 && *places.rbegin() < 128 * kNarrowRow, "places in narrow rows");
  for (uint32_t first = 0; first < 128; first += 8) {
    std::set<uint32_t> lines;
    for (uint32_t i = 0; i < 8; ++i) lines.insert(narrow_chunk(first + i, 1) / 16 % 8);
    check(lines.size() == 8, "banks of narrow rows", first);
  }
}

void splits() {
  for (const int32_t steps : {1, 2, 7, 100}) {
    for (const int32_t count : {1, 2, 3, 7, 150}) {
      check(split_begin(steps, 0, count) == 0 && split_begin(steps, count, count) == steps, "ends", steps, count);
      for (int32_t i = 0; i < count; ++i) {
        const int32_t share = split_begin(steps, i + 1, count) - split_begin(steps, i, count);
        check(share == steps / count || share == steps / count + 1, "share", steps, count);
      }
    }
  }
}

PackedConvolution convolution(const Shape& shape, int64_t k, uintptr_t x = 256) {
  PackedConvolution p{};
  p.x = reinterpret_cast<const void*>(x);
  p.shape = shape;
  p.k = k;
  p.side = 3;
  p.dtype = DType::kBFloat16;
  return p;
}

void convolution_plans() {
  const Plan typical = plan(convolution({8, 128, 128, 256}, 256), 132);
  check(typical.tile == kLarge && typical.piece == 16 && typical.blocks == 1024 * 2, "a large map", typical.blocks);
  check(plan(convolution({1, 16, 16, 512}, 512), 132).tile == kSmall, "few tiles");
  check(plan(convolution({8, 128, 128, 256}, 21), 132).tile == kSmall, "few output channels");
  for (const int64_t c : {12, 18, 21}) {
    const int piece = c == 12 ? 8 : c == 18 ? 4 : 2;
    const Plan by_channels = plan(convolution({8, 128, 128, c}, 256), 132);
    const Plan by_address = plan(convolution({8, 128, 128, 256}, 256, 256 + 2 * c), 132);
    for (const Plan& odd : {by_channels, by_address}) {
      check(odd.piece == piece && odd.tile == kSmall, "not in whole chunks", c, odd.piece);
    }
  }
  check(typical.shared_bytes * kResident <= 163840, "two blocks on one multiprocessor of sm_80", typical.shared_bytes);
}

void convolution_plans_of_sm90a() {
  const auto outs = [](const PackedConvolution& p, int capability = 90) { return sm90::plan(p, capability, 132).outs; };
  PackedConvolution p = convolution({8, 128, 128, 256}, 256);
  const sm90::Plan typical = sm90::plan(p, 90, 132);
  check(typical.outs == 256 && typical.blocks == 132, "a large map", typical.outs, typical.blocks);
  check(sm90::plan(p, 90, 131).blocks == 130, "whole clusters");
  check(outs(p, 80) == 0 && outs(p, 100) == 0 && outs(p, 120) == 0, "other architectures");
  check(outs(convolution({8, 128, 128, 256}, 72)) == 128 && outs(convolution({8, 128, 128, 256}, 64)) == 64, "few");
  check(outs(convolution({8, 16, 16, 512}, 512)) == 64, "few tiles are narrow");
  check(sm90::plan(convolution({1, 1, 1, 8}, 8), 90, 132).blocks == 2, "one pixel, one cluster");
  check(outs(convolution({8, 128, 128, 252}, 256)) == 0 && outs(convolution({8, 128, 128, 256}, 20)) == 0, "odd rows");
  check(outs(convolution({8, 128, 128, 256}, 256, 264)) == 0, "an odd address");
  p.out.select = reinterpret_cast<const void*>(uintptr_t{24});
  check(outs(p) == 0, "an odd address on the way out");
  p = convolution({8, 128, 128, 256}, 256);
  p.dtype = DType::kFloat32;
  check(outs(p) == 0, "float32");
  p.dtype = DType::kFloat16;
  check(outs(p) == 256, "float16");
  p.sm80_loop = true;
  check(outs(p) == 0, "the other loop was asked for");
  check(sm90::is_plain(p), "nothing but a result");
  p.splits = 2;
  check(!sm90::is_plain(p), "sums of splits");
  p.splits = 0;
  p.out.adds = 1;
  check(!sm90::is_plain(p), "a sum");
  check(outs(convolution({int64_t{1} << 30, 1, 1, 8}, 320)) == 0, "more tiles than are counted");
  check(outs(convolution({1, 46336, 46336, 64}, 64)) == 64, "2^31 - ... pixels");
}

// Where tiles are few: as many as there is room for, of whole slices and enough steps, not more than 64 MB of sums.
void convolution_splits() {
  const auto splits = [](const PackedConvolution& p) { return plan(p, 108).splits; };
  const auto hopper = [](const PackedConvolution& p) { return sm90::plan(p, 90, 132).splits; };
  for (const Shape& s : {Shape{8, 128, 128, 256}, Shape{8, 16, 16, 512}, Shape{1, 64, 64, 256}}) {
    const PackedConvolution p = convolution(s, s.c);
    check(splits(p) == 1 && hopper(p) == 1 && !plan(p, 108).parts, "tiles are enough", s.h, s.c);
  }
  PackedConvolution p = convolution({1, 32, 32, 256}, 256);
  const Plan usual = plan(p, 108);
  check(usual.splits == 3 && usual.tile == kSmall && usual.blocks == 64 * 3, "64 tiles", usual.splits, usual.blocks);
  check(usual.parts == 3 * 32 * 32 * 256, "room for all sums", usual.parts);
  const sm90::Plan wide = sm90::plan(p, 90, 132);
  check(wide.splits == 4 && wide.outs == 64 && wide.blocks == 128 && wide.parts == 4 * 32 * 32 * 256, "32 tiles",
        wide.splits, wide.blocks);
  p.side = 1;
  check(splits(p) == 1 && hopper(p) == 1, "few steps");
  p = convolution({1, 16, 16, 512}, 512);
  check(splits(p) == 6 && hopper(p) == 8, "fewer tiles", splits(p), hopper(p));
  for (const int asked : {1, 2, 5, 100}) {
    p.splits = asked;
    check(splits(p) == std::min(asked, 16) && hopper(p) == std::min(asked, 8), "as asked, of whole slices", asked);
  }
  p = convolution({8, 128, 128, 256}, 256);
  p.splits = 4;
  check(splits(p) == 1 && hopper(p) == 1, "no more than 64 MB");
  p = convolution({1, 8, 8, 24}, 16);
  check(splits(p) == 1 && hopper(p) == 1, "one slice");
  p.pool_in = true;
  p.splits = 4;
  check(splits(p) == 1, "a pool on the way in");
}

// Every tile of every split is taken once, however many clusters take turns; nothing else but, by the last cluster of a
// split, tiles beyond the last image.
void tiles_of_sm90a() {
  for (const Shape& s : {Shape{1, 1, 1, 8}, Shape{3, 5, 20, 8}, Shape{1, 17, 9, 8}, Shape{2, 33, 9, 8}}) {
    for (const int64_t k : {24, 200}) {
      PackedConvolution p = convolution(s, k);
      const sm90::TileOrder order = sm90::tile_order(p, 64);
      const int64_t pixels = s.n * ((s.h + 15) / 16) * ((s.w + 7) / 8), outs = (k + 63) / 64;
      for (const int32_t splits : {1, 3}) {
        for (const int32_t clusters : {1, 2, 7, 100}) {
          std::set<std::array<int32_t, 5>> taken;
          int64_t beyond = 0;
          for (int32_t cluster = 0; cluster < clusters; ++cluster) {
            for (int32_t number = cluster;; number += clusters) {
              const sm90::SplitTile a = sm90::tile_at(order, number, 0), b = sm90::tile_at(order, number, 1);
              check((a.split >= splits) == (number >= order.count * splits), "the last tile", number);
              if (a.split >= splits) break;
              check(a.out == b.out && a.split == b.split, "what a cluster shares", number);
              for (const sm90::SplitTile& tile : {a, b}) {
                const Pixel& at = tile.first;
                beyond += at.image >= s.n;
                if (at.image >= s.n) continue;
                check(at.row < s.h && at.row % 16 == 0 && at.column < s.w && at.column % 8 == 0, "a tile", number);
                check(tile.out < k && tile.out % 64 == 0, "output channels", number, tile.out);
                check(taken.insert({at.image, at.row, at.column, tile.out, tile.split}).second, "once", number);
              }
            }
          }
          check(static_cast<int64_t>(taken.size()) == pixels * outs * splits, "every tile", taken.size(), splits);
          check(beyond == pixels % 2 * outs * splits, "tiles of no pixels", beyond, splits);
        }
      }
    }
  }
}

// As many as are taken, the last of them.
void most_tiles_of_sm90a() {
  for (const int64_t k : {64, 128}) {
    const int64_t n = kMostCounted * 64 / k;
    const PackedConvolution p = convolution({n, 1, 1, 8}, k);
    check(refusal(p.shape, k) == nullptr && sm90::takes(p, 90), "taken", n, k);
    check(!sm90::takes(convolution({n + 2, 1, 1, 8}, k), 90), "one cluster more", n, k);
    const sm90::TileOrder order = sm90::tile_order(p, 64);
    check(order.count == kMostCounted / 2, "tiles", order.count, k);
    const sm90::SplitTile last = sm90::tile_at(order, order.count - 1, 1);
    check(last.first.image == n - 1 && last.out == k - 64 && last.split == 0, "the last", last.first.image, last.out);
    check(sm90::tile_at(order, order.count - 1 + 100, 1).split == 1, "behind it", k);
  }
}

void weight_grad_plans() {
  PackedWeightGrad p{};
  p.shape = {8, 128, 128, 256};
  p.k = 256;
  p.side = 3;
  p.dtype = DType::kBFloat16;
  const Plan typical = plan(p, 132);
  check(typical.tile == kLarge && typical.splits == 7 && typical.blocks == 2 * 2 * 9 * 7, "typical", typical.splits);
  p.exact = true;
  check(plan(p, 132).tile == kSmall, "three products");
  p.shape = {1, 1, 1, 1};
  check(plan(p, 132).splits == 1, "one pixel");
  p.shape = {8, 128, 128, 4096};
  p.k = 4096;
  check(plan(p, 132).splits == 1, "sums as large as the limit");
}

void refusals() {
  const int64_t billion = 1 << 30;
  check(refusal({8, 128, 128, 256}, 256) == nullptr, "usual sizes");
  check(refusal({1, 46340, 46340, 64}, 64) == nullptr, "2^31 - ... pixels");
  check(refusal({0, 5, 5, 3}, 3) && refusal({1, 5, 5, 3}, 0), "nothing");
  check(refusal({2, billion, 1, 1}, 1) && refusal({1, billion, billion, 1}, 1), "too many pixels");
  check(refusal({billion, billion, billion, 1}, 1) != nullptr, "too many to multiply");
  check(refusal({1, 1, 1, billion}, billion) != nullptr, "too many weights");
  check(refusal({1, billion, 1, 1}, 64 * 200) != nullptr, "too many blocks");
}

}  // namespace

int main() {
  divisions();
  pixels();
  wide_rows<128>();
  wide_rows<256>();
  wide_rows<512>();
  narrow_rows();
  splits();
  convolution_plans();
  convolution_plans_of_sm90a();
  convolution_splits();
  tiles_of_sm90a();
  most_tiles_of_sm90a();
  weight_grad_plans();
  refusals();
  std::printf("%d failed\n", failures);
  return failures != 0;
}
