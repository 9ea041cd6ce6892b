// 3x3 convolution, stride 1, padding 1, by Winograd's F(4x4, 3x3), with the ways in and out inside the transforms.
//
// Of a large map, all weights are transformed first. A block is some tiles of 4x4 outputs, all input channels; it is
// transformed, and per group of output channels 36 products of [tiles][C] by [C][panel] go straight into the output
// transform. Of a small map, all tiles are transformed first, and weights of a panel when it is their turn: there, four
// times as many weights would take longer to read from memory than to compute again.
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/patches.h"
#include "cpu/pooled.h"
#include "cpu/threads.h"
#include "cpu/way_out.h"
#include "cpu/weights.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {
namespace {

// Bytes of transformed patches and of their products that a block has, where the fewest tiles have no more: less than
// the second-level cache holds, 512 KB on Zen 2 to 4 and 1 to 2 MB on the processors that have AVX-512. More would be
// no faster there (with 32 to 128 channels, seen up to 704 KB), and they are memory that the call needs.
constexpr int64_t kBlockBytes = 352 * 1024;
// Tiles of a block at least. For fewer the weights would be read too often, from the outer cache or from memory; that
// then the patches, which are read in order, come from the outer cache costs less.
constexpr int64_t kFewestTiles = round_up(24, kMaxRows);
constexpr int64_t kSmallTiles = 96;   // of a small map, at most: the products of a panel stay in the second-level cache
constexpr int64_t kFewTiles = 4;      // that a thread transforms at a time, of a small map
constexpr int64_t kSmallDepth = 256;  // input channels of a panel's weights that the second-level cache holds
constexpr int64_t kGroup = 64 / kPanel;  // panels whose products with a patch follow each other, of a large map

// How the work is divided; no sum depends on it.
struct Division : Tiling {
  bool small;
  int64_t panels, group, block, blocks;
  int64_t small_depth;            // input channels of a small map whose weights are transformed at a time
  int64_t pitch, panel_elements;  // from one transformed patch to the next, from one [C][kPanel] of weights to the next

  Division(const Convolution& p, int threads)
      : Tiling(p.shape),
        small(tiles <= kSmallTiles),
        panels(ceil_div(p.k, kPanel)),
        small_depth(smaller(kSmallDepth, p.shape.c)),
        pitch(patch_pitch(p.shape.c)),
        panel_elements(p.shape.c * kPanel + kStagger) {
    group = small ? 1 : smaller(kGroup, panels);
    const int64_t fit = kBlockBytes / (kPoints * 4 * (pitch + group * kPanel)) / kMaxRows * kMaxRows;
    blocks = small ? 1 : smaller(tiles, round_up(ceil_div(tiles, larger(kFewestTiles, fit)), threads));
    block = ceil_div(tiles, blocks);
  }
  int64_t begin(int64_t index) const { return tiles * index / blocks; }  // of a block
  int64_t group_panels(int64_t first) const { return smaller(group, panels - first); }
};

// The pooled pixels that neighbouring tiles of a row read.
Band band(const Tile& first, int64_t tiles) { return {first.n, first.y - 1, first.x - 1, tiles * kTile + 2}; }

// What all threads work in: of a small map its patches, else the weights. And what each has for itself.
struct Scratch {
  int64_t v_elements, u_elements, m_elements, pooled_elements;
  float* v;       // [tiles][36][pitch]: patches
  float* u;       // [groups][36][panels of the group][C][kPanel]: weights; of a small map [36][small_depth][kPanel]
  float* m;       // [panels of the group][block][36][kPanel]: products
  float* pooled;  // [band().elements()]

  Scratch(const Convolution& p, const Division& d)
      : v_elements(round_up((d.small ? d.tiles : d.block) * kPoints * d.pitch, 16)),
        u_elements(round_up(kPoints * (d.small ? d.small_depth * kPanel + kStagger : d.panels * d.panel_elements), 16)),
        m_elements(d.group * d.block * kPoints * kPanel),
        pooled_elements(p.pool_in ? round_up(band({}, smaller(d.small ? kFewTiles : d.block, d.across)).elements(), 16)
                                  : 0) {}
  int64_t shared(const Division& d) const { return d.small ? v_elements : u_elements; }
  int64_t own(const Division& d) const { return (d.small ? u_elements : v_elements) + m_elements + pooled_elements; }
  void place(const Division& d, float* memory, int thread) {
    float* mine = memory + shared(d) + own(d) * thread;
    v = d.small ? memory : mine;
    u = d.small ? mine : memory;
    m = mine + (d.small ? u_elements : v_elements);
    pooled = m + m_elements;
  }
};

// A panel's weights for `depth` input channels to u[point]; from one point to the next there are `stride` elements.
void transform_weights(const Convolution& p, int64_t panel, int64_t begin, int64_t depth,
                       float* u /* [36][.][depth][kPanel] */, int64_t stride) {
  float taps[kGathered * 9 * kPanel];
  for (int64_t c = 0; c < depth; ++c) {
    if (c % kGathered == 0) gather_weights<9>(p, panel, begin + c, smaller(kGathered, depth - c), taps);
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      Float g[9], rows[kPatch * 3], out[kPatch];
      for (int64_t t = 0; t < 9; ++t) g[t] = load(taps + (c % kGathered * 9 + t) * kPanel + half);
      for (int64_t j = 0; j < 3; ++j) winograd_weights(g + j, rows + j, 3, 3);
      for (int64_t i = 0; i < kPatch; ++i) {
        winograd_weights(rows + i * 3, out, 1, 1);
        for (int64_t j = 0; j < kPatch; ++j) store(u + (i * kPatch + j) * stride + c * kPanel + half, out[j]);
      }
    }
  }
}

// Neighbouring tiles of a row, pooled and transformed, to v[tile][point].
template <bool kRelu, class T>
void transform_pooled(const Convolution& p, const Division& d, const Scratch& s, const Band& band, int64_t tiles,
                      float* v) {
  for (int64_t begin = 0; begin < p.shape.c; begin += kPoolChunk) {
    pool_band(static_cast<const T*>(p.x), p.shape, band, begin, s.pooled);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t c = 0; c < smaller(kPoolChunk, p.shape.c - begin); c += kLanes) {
        transform<kRelu>(s.pooled + t * kTile * kPoolChunk + c, band.inputs() * kPoolChunk, kPoolChunk,
                         v + t * kPoints * d.pitch + begin + c, d.pitch, Full{});
      }
    }
  }
}

// `count` tiles from `begin` on, transformed, to v[tile][point].
template <bool kRelu, class T>
void transform_tiles(const Convolution& p, const Division& d, const Scratch& s, int64_t begin, int64_t count,
                     float* v) {
  for (int64_t t = 0, run; t < count; t += run) {
    const Tile tile = d.tile(begin + t);
    if (p.pool_in) {
      run = smaller(count - t, d.across - tile.x / kTile);
      transform_pooled<kRelu, T>(p, d, s, band(tile, run), run, v + t * kPoints * d.pitch);
    } else {
      run = 1;
      transform_patch<kRelu>(static_cast<const T*>(p.x), p.shape, tile, v + t * kPoints * d.pitch, d.pitch);
    }
  }
}

template <class T>
void transform_tiles(const Convolution& p, const Division& d, const Scratch& s, int64_t begin, int64_t count,
                     float* v) {
  p.relu_in ? transform_tiles<true, T>(p, d, s, begin, count, v) : transform_tiles<false, T>(p, d, s, begin, count, v);
}

// A tile's outputs, those inside the image.
struct Outputs {
  static constexpr int64_t kCount = kTile * kTile;
  Tile tile;
  int64_t first, row, bottom, right;

  Outputs(const Shape& s, const Tile& t)
      : tile(t),
        first((t.n * s.h + t.y) * s.w + t.x),
        row(s.w),
        bottom(smaller(kTile, s.h - t.y)),
        right(smaller(kTile, s.w - t.x)) {}

  template <class Body>
  void each(const Body& body) const {
    if (bottom == kTile && right == kTile) {
      for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t j = 0; j < kTile; ++j) body(i * kTile + j, first + i * row + j);
      }
    } else {
      for (int64_t i = 0; i < bottom; ++i) {
        for (int64_t j = 0; j < right; ++j) body(i * kTile + j, first + i * row + j);
      }
    }
  }
  Place place(int64_t i) const { return {tile.n, tile.y + i / kTile, tile.x + i % kTile}; }
};

// One tile's products for some channels, transformed back.
inline void transform_back(const float* m /* [36][kPanel] */, Float* out /* [16] */) {
  Float half[kTile * kPatch];
  for (int64_t j = 0; j < kPatch; ++j) {
    Float column[kPatch];
    for (int64_t i = 0; i < kPatch; ++i) column[i] = load(m + (i * kPatch + j) * kPanel);
    winograd_output(column, half + j, 1, kPatch);
  }
  for (int64_t i = 0; i < kTile; ++i) winograd_output(half + i * kPatch, out + i * kTile, 1, 1);
}

// One tile and one panel, transformed back and out.
template <class T>
void finish_panel(const Convolution& p, const Tile& tile, const Taps& taps, int64_t k,
                  const float* m /* [36][kPanel] */) {
  const Outputs outputs(p.shape, tile);
  T* y = static_cast<T*>(p.y);
  if (!streams(y, p)) outputs.each([&](int64_t, int64_t pixel) { __builtin_prefetch(y + pixel * p.k + k, 1); });
  for_channels(smaller(kPanel, p.k - k), [&](int64_t c, auto lanes) {
    Float out[kTile * kTile];
    transform_back(m + c, out);
    way_out<T>(p, taps, outputs, k + c, lanes, out);
  });
}

// Some panels' products of `tiles` tiles, transformed back and out.
template <class T>
void finish(const Convolution& p, const Division& d, const Taps& taps, const float* m, int64_t begin, int64_t tiles,
            int64_t panel, int64_t panels) {
  for (int64_t t = 0; t < tiles; ++t) {
    const Tile tile = d.tile(begin + t);
    for (int64_t j = 0; j < panels; ++j) {
      finish_panel<T>(p, tile, taps, (panel + j) * kPanel, m + (j * d.block + t) * kPoints * kPanel);
    }
  }
}

template <class T>
void convolve_small(const Convolution& p, const Division& d, const Scratch& s, const Taps& taps) {
#pragma omp for schedule(dynamic)
  for (int64_t t = 0; t < d.tiles; t += kFewTiles) {
    transform_tiles<T>(p, d, s, t, smaller(kFewTiles, d.tiles - t), s.v + t * kPoints * d.pitch);
  }
#pragma omp for schedule(dynamic)
  for (int64_t panel = 0; panel < d.panels; ++panel) {
    for (int64_t c = 0; c < p.shape.c; c += d.small_depth) {
      const int64_t depth = smaller(d.small_depth, p.shape.c - c), stride = depth * kPanel + kStagger;
      transform_weights(p, panel, c, depth, s.u, stride);
      for (int64_t i = 0; i < kPoints; ++i) {
        gemm(s.v + i * d.pitch + c, kPoints * d.pitch, s.u + i * stride, depth, s.m + i * kPanel, kPoints * kPanel,
             d.tiles, c > 0);
      }
    }
    finish<T>(p, d, taps, s.m, 0, d.tiles, panel, 1);
  }
}

template <class T>
void convolve_large(const Convolution& p, const Division& d, const Scratch& s, const Taps& taps) {
#pragma omp for schedule(static)
  for (int64_t panel = 0; panel < d.panels; ++panel) {
    const int64_t first = panel / d.group * d.group, stride = d.group_panels(first) * d.panel_elements;
    float* u = s.u + first * kPoints * d.panel_elements + (panel - first) * d.panel_elements;
    transform_weights(p, panel, 0, p.shape.c, u, stride);
  }
#pragma omp for schedule(dynamic)
  for (int64_t block = 0; block < d.blocks; ++block) {
    const int64_t begin = d.begin(block), tiles = d.begin(block + 1) - begin;
    transform_tiles<T>(p, d, s, begin, tiles, s.v);
    const float* u = s.u;
    for (int64_t first = 0; first < d.panels; first += d.group) {
      const int64_t panels = d.group_panels(first);
      for (int64_t i = 0; i < kPoints * panels; ++i, u += d.panel_elements) {
        const int64_t point = i / panels, j = i % panels;
        gemm(s.v + point * d.pitch, kPoints * d.pitch, u, p.shape.c, s.m + (j * d.block * kPoints + point) * kPanel,
             kPoints * kPanel, tiles);
      }
      finish<T>(p, d, taps, s.m, begin, tiles, first, panels);
    }
  }
}

template <class T>
void convolve(const Convolution& p, int threads) {
  const Division d(p, threads);
  const Scratch sizes(p, d);
  const Workspace workspace(Taps::bytes(p) + (sizes.shared(d) + sizes.own(d) * threads) * 4);
  char* memory = workspace.data();
  const Taps taps(p, memory);
#pragma omp parallel num_threads(threads)
  {
    Scratch s = sizes;
    s.place(d, reinterpret_cast<float*>(memory + Taps::bytes(p)), thread_number());
    d.small ? convolve_small<T>(p, d, s, taps) : convolve_large<T>(p, d, s, taps);
    fence();
  }
}

}  // namespace

void conv3x3(const Convolution& p, int threads) {
  if (p.shape.n == 0) return;
  p.dtype == DType::kFloat32 ? convolve<float>(p, threads) : convolve<BFloat16>(p, threads);
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
