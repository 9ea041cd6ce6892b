// 3x3 convolution, stride 1, padding 1, by Winograd's F(4x4, 3x3), with the ways in and out inside the transforms.
//
// A block is some tiles of 4x4 outputs, all input channels: its transformed patches stay in the second-level cache.
// Per panel of output channels, 36 products of [tiles][C] by [C][panel] go straight into the output transform. Packed
// weights are read from the outer cache once per block.
#include "cpu/corners.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/patches.h"
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
// From one point's weights of a panel, [C][kPanel], to the next one's.
int64_t point_elements(int64_t c) { return c * kPanel + kStagger; }

// How the work is divided. The tiles of a block depend on the sizes alone. Panels are divided among threads where there
// are few blocks, which changes no sum.
struct Division : Tiling {
  int64_t block, blocks, panels, slices;

  Division(const Conv3x3& p, int threads) : Tiling(p.shape) {
    constexpr int64_t kItemsPerThread = 4;
    const int64_t fit = kBlockBytes / (kPoints * 4 * (patch_pitch(p.shape.c) + kPanel));
    block = smaller(tiles, larger(kMaxRows, fit / kMaxRows * kMaxRows));
    blocks = ceil_div(tiles, block);
    panels = ceil_div(p.k, kPanel);
    const int64_t wanted = ceil_div(kItemsPerThread * threads, blocks);
    slices = threads == 1 ? 1 : smaller(panels, wanted);
  }
};

// One tile's products for some channels, transformed back, and the way out.
template <class T, class Count>
void finish_tile(const Conv3x3& p, const Tile& tile, const float* m /* [36][.][kPanel] */, int64_t point_stride,
                 int64_t k, Count lanes) {
  const Shape& s = p.shape;
  Float half[kTile * kPatch], out[kTile * kTile];
  for (int64_t j = 0; j < kPatch; ++j) {
    Float column[kPatch];
    for (int64_t i = 0; i < kPatch; ++i) column[i] = load(m + (i * kPatch + j) * point_stride);
    winograd_output(column, half + j, 1, kPatch);
  }
  for (int64_t i = 0; i < kTile; ++i) winograd_output(half + i * kPatch, out + i * kTile, 1, 1);
  const Float bias = p.bias ? load(p.bias + k, lanes) : Float{};
  const int64_t bottom = smaller(kTile, s.h - tile.y), right = smaller(kTile, s.w - tile.x);
  for (int64_t i = 0; i < bottom; ++i) {
    for (int64_t j = 0; j < right; ++j) {
      const int64_t at = ((tile.n * s.h + tile.y + i) * s.w + tile.x + j) * p.k + k;
      Float value = out[i * kTile + j] + bias;
      if (p.relu_out) value = relu(value);
      if (p.select) value = keep(~(load(static_cast<const T*>(p.select) + at, lanes) <= Float{}), value);
      for (int64_t a = 0; a < p.adds; ++a) {
        const Float other = load(static_cast<const T*>(p.add[a]) + at, lanes);
        value += a < p.raw_adds ? other : relu(other);
      }
      if (p.low) {
        const BilinearTaps row = bilinear_taps(p.rows, tile.y + i), column = bilinear_taps(p.columns, tile.x + j);
        const T* image = static_cast<const T*>(p.low) + tile.n * p.rows.in * p.columns.in * p.k;
        value += blend(image, corners(row, column, p.columns.in, p.k), k, lanes);
      }
      store(static_cast<T*>(p.y) + at, value, lanes);
    }
  }
}

// A thread's transformed patches and products, for each of the 36 points.
struct Scratch {
  int64_t pitch, v_stride, m_stride;
  float* v;  // [36][block][pitch]
  float* m;  // [36][block][kPanel]

  Scratch(const Conv3x3& p, const Division& d)
      : pitch(patch_pitch(p.shape.c)), v_stride(d.block * pitch + kStagger), m_stride(d.block * kPanel + kStagger) {}
  int64_t bytes() const { return round_up(kPoints * (v_stride + m_stride) * 4, 64); }
  void place(char* memory) {
    v = reinterpret_cast<float*>(memory);
    m = v + kPoints * v_stride;
  }
};

template <class T>
void transform_tile(const Conv3x3& p, const Tile& tile, float* v /* [36][.][pitch] */, int64_t point_stride) {
  const T* x = static_cast<const T*>(p.x);
  if (p.pool_in) {
    p.relu_in ? transform_pooled_patch<true>(x, p.shape, tile, v, point_stride)
              : transform_pooled_patch<false>(x, p.shape, tile, v, point_stride);
  } else {
    p.relu_in ? transform_patch<true>(x, p.shape, tile, v, point_stride)
              : transform_patch<false>(x, p.shape, tile, v, point_stride);
  }
}

// Panels first ... last - 1 of a block of tiles.
template <class T>
void convolve_block(const Conv3x3& p, const Division& d, int64_t block, int64_t first, int64_t last, const Scratch& s) {
  const int64_t begin = block * d.block, tiles = smaller(d.block, d.tiles - begin);
  for (int64_t t = 0; t < tiles; ++t) transform_tile<T>(p, d.tile(begin + t), s.v + t * s.pitch, s.v_stride);
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t i = 0; i < kPoints; ++i) {
      const float* u = p.weights + (panel * kPoints + i) * point_elements(p.shape.c);
      gemm(s.v + i * s.v_stride, s.pitch, u, p.shape.c, s.m + i * s.m_stride, tiles);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t half = 0; half < kPanel; half += kLanes) {
        const int64_t k = panel * kPanel + half, left = p.k - k;
        const float* products = s.m + t * kPanel + half;
        if (left >= kLanes) {
          finish_tile<T>(p, d.tile(begin + t), products, s.m_stride, k, Full{});
        } else if (left > 0) {
          finish_tile<T>(p, d.tile(begin + t), products, s.m_stride, k, Partial{left});
        }
      }
    }
  }
}

template <class T>
void convolve(const Conv3x3& p, int threads) {
  const Division d(p, threads);
  const Scratch sizes(p, d);
  char* memory = static_cast<char*>(workspace(sizes.bytes() * threads));
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch = sizes;
    scratch.place(memory + sizes.bytes() * thread_number());
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < d.blocks * d.slices; ++i) {
      const int64_t slice = i % d.slices;
      convolve_block<T>(p, d, i / d.slices, d.panels * slice / d.slices, d.panels * (slice + 1) / d.slices, scratch);
    }
  }
}

}  // namespace

void conv3x3(const Conv3x3& p, int threads) {
  if (p.shape.n == 0) return;
  p.dtype == DType::kFloat32 ? convolve<float>(p, threads) : convolve<BFloat16>(p, threads);
}

int64_t conv3x3_packed_elements(int64_t k, int64_t c) { return ceil_div(k, kPanel) * kPoints * point_elements(c); }

// To [K / kPanel][36][C][kPanel], the 36 staggered; channels past the last are 0.
void conv3x3_pack(const PackConv3x3& p, int threads) {
  const int64_t panels = ceil_div(p.k, kPanel);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < panels * p.c; ++i) {
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
      float* to = p.packed + panel * kPoints * point_elements(p.c) + c * kPanel + half;
      for (int64_t j = 0; j < kPoints; ++j) store(to + j * point_elements(p.c), u[j]);
    }
  }
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
