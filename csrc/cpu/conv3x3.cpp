// 3x3 convolution, stride 1, padding 1, by Winograd's F(4x4, 3x3), with the ways in and out inside the transforms.
//
// A block is some tiles of 4x4 outputs, all input channels: its transformed patches stay in the second-level cache.
// Per panel of output channels, 36 products of [tiles][C] by [C][panel] go straight into the output transform. Packed
// weights are read from the outer cache once per block. Where there are few blocks, all patches are transformed first
// and the panels divided among the threads.
#include "cpu/corners.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/pooled.h"
#include "cpu/threads.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {
namespace {

// Bytes of transformed patches and products that a block has, so that they stay in the second-level cache:
// 512 KB on Zen 2 to 4, 1 to 2 MB on the processors that have AVX-512.
#if defined(__AVX512F__)
constexpr int64_t kBlockBytes = 704 * 1024;
#else
constexpr int64_t kBlockBytes = 512 * 1024;
#endif
// Tiles of a block at least. For fewer the weights would be read too often, from the outer cache or from memory; that
// then the patches, which are read in order, come from the outer cache costs less.
constexpr int64_t kFewestTiles = 24;
constexpr int64_t kFewTiles = 4;        // that a thread transforms at a time, where all patches are transformed first
constexpr int64_t kItemsPerThread = 4;  // at least, for the threads to end at about the same time

// Weights are packed as [groups][36][panels of the group][C][kPanel], each [C][kPanel] staggered: one point's products
// with a group's panels follow each other, so that its patches come from the outer cache once for all of them.
constexpr int64_t kGroup = 64 / kPanel;  // panels
struct Packing {
  int64_t panels, panel_elements;

  Packing(int64_t k, int64_t c) : panels(ceil_div(k, kPanel)), panel_elements(c * kPanel + kStagger) {}
  int64_t elements() const { return panels * kPoints * panel_elements; }
  int64_t groups() const { return ceil_div(panels, kGroup); }
  int64_t group_panels(int64_t group) const { return smaller(kGroup, panels - group * kGroup); }
  // Where one point's weights of a panel are.
  int64_t at(int64_t panel, int64_t point) const {
    const int64_t group = panel / kGroup;
    return (group * kGroup * kPoints + point * group_panels(group) + panel % kGroup) * panel_elements;
  }
};

// How the work is divided; no sum depends on it.
struct Division : Tiling {
  Packing packing;
  int64_t block, blocks, slices;
  bool shared;  // all patches are transformed before the products, for all threads

  Division(const Conv3x3& p, int threads) : Tiling(p.shape), packing(p.k, p.shape.c) {
    const int64_t fit = kBlockBytes / (kPoints * 4 * patch_pitch(p.shape.c));
    const int64_t most = larger(kFewestTiles, fit / kMaxRows * kMaxRows);
    blocks = ceil_div(tiles, most);
    block = ceil_div(tiles, blocks);
    shared = threads > 1 && blocks < kItemsPerThread * threads;
    slices = shared ? smaller(packing.groups(), ceil_div(kItemsPerThread * threads, blocks)) : 1;
  }
  int64_t begin(int64_t block_index) const { return tiles * block_index / blocks; }
};

// What a thread works in, and where the patches are.
struct Scratch {
  int64_t pitch, v_stride, m_stride, v_bytes, own_bytes;
  float* v;       // [36][tiles of a block, or all][pitch]: patches
  float* m;       // [36][kGroup][block][kPanel]: products
  float* pooled;  // [pooled_elements]

  Scratch(const Conv3x3& p, const Division& d)
      : pitch(patch_pitch(p.shape.c)),
        v_stride((d.shared ? d.tiles : d.block) * pitch + kStagger),
        m_stride(d.block * smaller(kGroup, d.packing.panels) * kPanel + kStagger),
        v_bytes(round_up(kPoints * v_stride * 4, 64)) {
    const int64_t pooled_bytes = p.pool_in ? pooled_elements(smaller(d.block, d.across)) * 4 : 0;
    own_bytes = round_up(kPoints * m_stride * 4 + pooled_bytes, 64) + (d.shared ? 0 : v_bytes);
  }
  int64_t bytes(const Division& d, int threads) const { return own_bytes * threads + (d.shared ? v_bytes : 0); }
  void place(const Division& d, char* memory, int thread) {
    char* own = memory + (d.shared ? v_bytes : 0) + own_bytes * thread;
    v = reinterpret_cast<float*>(d.shared ? memory : own);
    m = reinterpret_cast<float*>(own + (d.shared ? 0 : v_bytes));
    pooled = m + kPoints * m_stride;
  }
};

// `count` tiles from `begin` on, transformed, to v[point][tile].
template <bool kRelu, class T>
void transform_tiles(const Conv3x3& p, const Division& d, const Scratch& s, int64_t begin, int64_t count, float* v) {
  const T* x = static_cast<const T*>(p.x);
  for (int64_t t = 0, run; t < count; t += run) {
    const Tile tile = d.tile(begin + t);
    run = p.pool_in ? smaller(count - t, d.across - tile.x / kTile) : 1;
    float* to = v + t * s.pitch;
    if (p.pool_in) {
      transform_pooled_run<kRelu>(x, p.shape, {tile, run}, to, s.pitch, s.v_stride, s.pooled);
    } else {
      transform_patch<kRelu>(x, p.shape, tile, to, s.v_stride);
    }
  }
}

template <class T>
void transform_tiles(const Conv3x3& p, const Division& d, const Scratch& s, int64_t begin, int64_t count, float* v) {
  p.relu_in ? transform_tiles<true, T>(p, d, s, begin, count, v) : transform_tiles<false, T>(p, d, s, begin, count, v);
}

// Where a tile's outputs of a channel are, those inside the image.
struct Outputs {
  int64_t first, row, column, bottom, right;

  Outputs(const Conv3x3& p, const Tile& tile, int64_t k)
      : first(((tile.n * p.shape.h + tile.y) * p.shape.w + tile.x) * p.k + k),
        row(p.shape.w * p.k),
        column(p.k),
        bottom(smaller(kTile, p.shape.h - tile.y)),
        right(smaller(kTile, p.shape.w - tile.x)) {}

  // body(element, i, j)
  template <class Body>
  void each(const Body& body) const {
    if (bottom == kTile && right == kTile) {
      for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t j = 0; j < kTile; ++j) body(first + i * row + j * column, i, j);
      }
    } else {
      for (int64_t i = 0; i < bottom; ++i) {
        for (int64_t j = 0; j < right; ++j) body(first + i * row + j * column, i, j);
      }
    }
  }
};

// Taps of every row and every column of the resized tensor.
struct Taps {
  const BilinearTaps *rows /* [H] */, *columns /* [W] */;
};

// The way out of a tile and some channels.
template <class T, class Count>
void way_out(const Conv3x3& p, const Tile& tile, const Outputs& outputs, const Taps& taps, int64_t k, Count lanes,
             Float* out /* [16] */) {
  if (p.bias) {
    const Float bias = load(p.bias + k, lanes);
    for (int64_t i = 0; i < kTile * kTile; ++i) out[i] += bias;
  }
  if (p.relu_out) {
    for (int64_t i = 0; i < kTile * kTile; ++i) out[i] = relu(out[i]);
  }
  if (p.select) {
    const T* select = static_cast<const T*>(p.select);
    outputs.each([&](int64_t at, int64_t i, int64_t j) {
      Float& v = out[i * kTile + j];
      v = keep(~(load(select + at, lanes) <= Float{}), v);
    });
  }
  for (int64_t a = 0; a < p.adds; ++a) {
    const T* add = static_cast<const T*>(p.add[a]);
    if (a < p.raw_adds) {
      outputs.each([&](int64_t at, int64_t i, int64_t j) { out[i * kTile + j] += load(add + at, lanes); });
    } else {
      outputs.each([&](int64_t at, int64_t i, int64_t j) { out[i * kTile + j] += relu(load(add + at, lanes)); });
    }
  }
  if (p.low) {
    const T* image = static_cast<const T*>(p.low) + tile.n * p.rows.in * p.columns.in * p.k + k;
    outputs.each([&](int64_t, int64_t i, int64_t j) {
      const Corners from = corners(taps.rows[tile.y + i], taps.columns[tile.x + j], p.columns.in, p.k);
      out[i * kTile + j] += blend(image, from, 0, lanes);
    });
  }
}

// One tile's products for some channels, transformed back.
inline void transform_back(const float* m /* [36][.][kPanel] */, int64_t point_stride, Float* out /* [16] */) {
  Float half[kTile * kPatch];
  for (int64_t j = 0; j < kPatch; ++j) {
    Float column[kPatch];
    for (int64_t i = 0; i < kPatch; ++i) column[i] = load(m + (i * kPatch + j) * point_stride);
    winograd_output(column, half + j, 1, kPatch);
  }
  for (int64_t i = 0; i < kTile; ++i) winograd_output(half + i * kPatch, out + i * kTile, 1, 1);
}

// One tile and one panel, transformed back and out.
template <class T>
void finish_panel(const Conv3x3& p, const Tile& tile, const Taps& taps, int64_t k, const float* m /* [36][.][kPanel] */,
                  int64_t point_stride) {
  T* y = static_cast<T*>(p.y);
  const Outputs outputs(p, tile, k);
  outputs.each([&](int64_t at, int64_t, int64_t) { __builtin_prefetch(y + at, 1); });
  for (int64_t half = 0; half < smaller(kPanel, p.k - k); half += kLanes) {
    const int64_t channels = p.k - k - half;
    Float out[kTile * kTile];
    transform_back(m + half, point_stride, out);
    const auto write = [&](auto lanes) {
      way_out<T>(p, tile, Outputs(p, tile, k + half), taps, k + half, lanes, out);
      outputs.each([&](int64_t at, int64_t i, int64_t j) { store(y + at + half, out[i * kTile + j], lanes); });
    };
    channels >= kLanes ? write(Full{}) : write(Partial{channels});
  }
}

// Groups first ... last - 1 of the tiles begin ... begin + tiles - 1, whose patches are at v.
template <class T>
void multiply_block(const Conv3x3& p, const Division& d, const Scratch& s, const Taps& taps, const float* v,
                    int64_t begin, int64_t tiles, int64_t first, int64_t last) {
  for (int64_t group = first; group < last; ++group) {
    const int64_t panel = group * kGroup, panels = d.packing.group_panels(group);
    for (int64_t i = 0; i < kPoints; ++i) {
      for (int64_t j = 0; j < panels; ++j) {
        const float* u = p.weights + d.packing.at(panel + j, i);
        gemm(v + i * s.v_stride, s.pitch, u, p.shape.c, s.m + i * s.m_stride + j * d.block * kPanel, tiles);
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const Tile tile = d.tile(begin + t);
      for (int64_t j = 0; j < panels; ++j) {
        const float* products = s.m + (j * d.block + t) * kPanel;
        const int64_t k = (panel + j) * kPanel;
        finish_panel<T>(p, tile, taps, k, products, s.m_stride);
      }
    }
  }
}

Taps all_taps(const Conv3x3& p, BilinearTaps* taps /* [H + W] */) {
  if (!p.low) return {};
  for (int64_t i = 0; i < p.shape.h; ++i) taps[i] = bilinear_taps(p.rows, i);
  for (int64_t j = 0; j < p.shape.w; ++j) taps[p.shape.h + j] = bilinear_taps(p.columns, j);
  return {taps, taps + p.shape.h};
}

template <class T>
void convolve(const Conv3x3& p, int threads) {
  const Division d(p, threads);
  const Scratch sizes(p, d);
  const int64_t taps_bytes = p.low ? round_up((p.shape.h + p.shape.w) * sizeof(BilinearTaps), 64) : 0;
  char* memory = static_cast<char*>(workspace(taps_bytes + sizes.bytes(d, threads)));
  const Taps taps = all_taps(p, reinterpret_cast<BilinearTaps*>(memory));
#pragma omp parallel num_threads(threads)
  {
    Scratch s = sizes;
    s.place(d, memory + taps_bytes, thread_number());
    if (d.shared) {
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < d.tiles; t += kFewTiles) {
        transform_tiles<T>(p, d, s, t, smaller(kFewTiles, d.tiles - t), s.v + t * s.pitch);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < d.blocks * d.slices; ++i) {
      const int64_t slice = i / d.blocks, begin = d.begin(i % d.blocks), tiles = d.begin(i % d.blocks + 1) - begin;
      if (!d.shared) transform_tiles<T>(p, d, s, begin, tiles, s.v);
      multiply_block<T>(p, d, s, taps, s.v + (d.shared ? begin * s.pitch : 0), begin, tiles,
                        d.packing.groups() * slice / d.slices, d.packing.groups() * (slice + 1) / d.slices);
    }
  }
}

}  // namespace

void conv3x3(const Conv3x3& p, int threads) {
  if (p.shape.n == 0) return;
  p.dtype == DType::kFloat32 ? convolve<float>(p, threads) : convolve<BFloat16>(p, threads);
}

int64_t conv3x3_packed_elements(int64_t k, int64_t c) { return Packing(k, c).elements(); }

// Output channels past the last are 0.
void conv3x3_pack(const PackConv3x3& p, int threads) {
  const Packing packing(p.k, p.c);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < packing.panels * p.c; ++i) {
    const int64_t panel = i / p.c, c = i % p.c;
    float taps[9][kPanel] = {};
    for (int64_t lane = 0; lane < smaller(kPanel, p.k - panel * kPanel); ++lane) {
      const float* from = p.weight + (panel * kPanel + lane) * p.strides[0] + c * p.strides[1];
      for (int64_t t = 0; t < 9; ++t) taps[t][lane] = from[t / 3 * p.strides[2] + t % 3 * p.strides[3]];
    }
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      Float g[9], rows[kPatch * 3], u[kPoints];
      for (int64_t t = 0; t < 9; ++t) g[t] = load(taps[t] + half);
      for (int64_t j = 0; j < 3; ++j) winograd_weights(g + j, rows + j, 3, 3);
      for (int64_t j = 0; j < kPatch; ++j) winograd_weights(rows + j * 3, u + j * kPatch, 1, 1);
      for (int64_t j = 0; j < kPoints; ++j) store(p.packed + packing.at(panel, j) + c * kPanel + half, u[j]);
    }
  }
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
