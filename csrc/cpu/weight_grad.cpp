// Gradient of the 3x3 convolution in its weight and its bias, by Winograd's algorithm transposed.
//
// The tiles are taken in chunks whose transformed patches and gradients the outer memory holds. Of each chunk, and each
// of the 36 points, [C][tiles] by [tiles][K] is added to the sums of that point. Every sum runs over the tiles in their
// order, whatever the chunks and the number of threads.
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/patches.h"
#include "cpu/threads.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {
namespace {

constexpr int64_t kChunkBytes = 32 << 20;  // chunks of 64 MB took up to 1.3 times as long on two threads
constexpr int64_t kDepth = 128;            // tiles whose gradients of a panel stay in the first-level cache
constexpr int64_t kAheadTiles = 32;        // tiles ahead whose patches are fetched into the first-level cache
constexpr int64_t kBiasTiles = 64;         // tiles whose gradients are summed by one thread

// How the work is divided, and what is kept on the way.
struct Plan : Tiling {
  int64_t chunk, panels, pitch, v_stride, m_stride, u_stride, parts;

  explicit Plan(const WeightGrad& p) : Tiling(p.shape) {
    panels = ceil_div(p.k, kPanel);
    pitch = patch_pitch(p.shape.c);
    chunk = smaller(tiles, larger(kDepth, kChunkBytes / (kPoints * 4 * (pitch + panels * kPanel)) / kDepth * kDepth));
    v_stride = chunk * pitch + kStagger;
    m_stride = chunk * panels * kPanel + kStagger;
    u_stride = p.shape.c * panels * kPanel + kStagger;
    parts = ceil_div(tiles, kBiasTiles);
  }
  int64_t elements() const { return kPoints * (v_stride + m_stride + u_stride) + parts * panels * kPanel; }
};

struct Buffers {
  float* v;     // [36][chunk][pitch]: patches of x
  float* m;     // [36][panels][chunk][kPanel]: gradients of y
  float* u;     // [36][panels][C][kPanel]: sums of their products
  float* bias;  // [parts][panels * kPanel]

  Buffers(const Plan& d, float* memory)
      : v(memory), m(v + kPoints * d.v_stride), u(m + kPoints * d.m_stride), bias(u + kPoints * d.u_stride) {}
};

// One tile of gy, transformed, to m[point][panel][.][kPanel]; what lies outside the image is 0. Its sum to `bias`.
template <class T>
void transform_gradient(const WeightGrad& p, const Plan& d, const Tile& tile, float* m, float* bias /* [K] */) {
  const Shape& s = p.shape;
  const T* gy = static_cast<const T*>(p.gy);
  for (int64_t k = 0; k < d.panels * kPanel; k += kLanes) {
    const int64_t left = p.k - k;
    Float y[kTile * kTile], sum{};
    for (int64_t i = 0; i < kTile * kTile; ++i) {
      const int64_t row = tile.y + i / kTile, column = tile.x + i % kTile;
      y[i] = Float{};
      if (row >= s.h || column >= s.w || left <= 0) continue;
      const T* from = gy + ((tile.n * s.h + row) * s.w + column) * p.k + k;
      y[i] = left >= kLanes ? load(from) : load(from, Partial{left});
      sum += y[i];
    }
    if (bias) store(bias + k, load(bias + k) + sum);
    Float half[kPatch * kTile], out[kPatch];
    for (int64_t j = 0; j < kTile; ++j) winograd_output_transposed(y + j, half + j, kTile, kTile);
    float* to = m + k / kPanel * d.chunk * kPanel + k % kPanel;
    for (int64_t i = 0; i < kPatch; ++i) {
      winograd_output_transposed(half + i * kTile, out, 1, 1);
      for (int64_t j = 0; j < kPatch; ++j) store(to + (i * kPatch + j) * d.m_stride, out[j]);
    }
  }
}

// u[r][k] += sum over t of v[t][r] m[t][k], for kRows input channels and one panel; or = where `first`.
template <int kRows>
void add_products(const float* v /* [depth][pitch] */, int64_t pitch, const float* m /* [depth][kPanel] */,
                  int64_t depth, float* u /* [kRows][kPanel] */, bool first) {
  Float sum[kRows][2] = {};
  if (!first) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = load(u + r * kPanel);
      sum[r][1] = load(u + r * kPanel + kLanes);
    }
  }
#pragma GCC unroll 2
  for (int64_t t = 0; t < depth; ++t, v += pitch, m += kPanel) {
    const Float left = load(m), right = load(m + kLanes);
    __builtin_prefetch(v + kAheadTiles * pitch);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Float value = splat(v[r]);
      sum[r][0] += value * left;
      sum[r][1] += value * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    store(u + r * kPanel, sum[r][0]);
    store(u + r * kPanel + kLanes, sum[r][1]);
  }
}

// add_products() for any number of input channels up to kRows.
template <int kRows = kMaxRows>
void add_group(int64_t rows, const float* v /* [depth][pitch] */, int64_t pitch, const float* m /* [depth][kPanel] */,
               int64_t depth, float* u /* [rows][kPanel] */, bool first) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return add_group<kRows - 1>(rows, v, pitch, m, depth, u, first);
  }
  add_products<kRows>(v, pitch, m, depth, u, first);
}

// The products of one point and one panel over a chunk's tiles, input channels in groups as equal as can be.
void multiply(const WeightGrad& p, const Plan& d, const float* v, const float* m, float* u, int64_t tiles, bool first) {
  for (int64_t t = 0; t < tiles; t += kDepth) {
    const int64_t depth = smaller(kDepth, tiles - t);
    const float *rows = v + t * d.pitch, *panel = m + t * kPanel;
    for (int64_t c = 0, left = ceil_div(p.shape.c, kMaxRows); left > 0; --left) {
      const int64_t count = ceil_div(p.shape.c - c, left);
      add_group(count, rows + c, d.pitch, panel, depth, u + c * kPanel, first && t == 0);
      c += count;
    }
  }
}

// The sums of some channels back to nine taps.
void finish(const WeightGrad& p, const Plan& d, const float* u, int64_t c, int64_t panel) {
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const float* from = u + (panel * p.shape.c + c) * kPanel + half;
    Float rows[3 * kPatch], taps[9];
    for (int64_t j = 0; j < kPatch; ++j) {
      Float column[kPatch];
      for (int64_t i = 0; i < kPatch; ++i) column[i] = load(from + (i * kPatch + j) * d.u_stride);
      winograd_weights_transposed(column, rows + j, 1, kPatch);
    }
    for (int64_t i = 0; i < 3; ++i) winograd_weights_transposed(rows + i * kPatch, taps + i * 3, 1, 1);
    const int64_t k = panel * kPanel + half;
    for (int64_t lane = 0; lane < smaller(kLanes, p.k - k); ++lane) {
      float* to = p.gw + (k + lane) * p.strides[0] + c * p.strides[1];
      for (int64_t t = 0; t < 9; ++t) to[t / 3 * p.strides[2] + t % 3 * p.strides[3]] = taps[t][lane];
    }
  }
}

template <class T>
void differentiate(const WeightGrad& p, int threads) {
  const Plan d(p);
  const Workspace workspace(d.elements() * 4);
  const Buffers b(d, reinterpret_cast<float*>(workspace.data()));
  const T* x = static_cast<const T*>(p.x);
#pragma omp parallel num_threads(threads)
  {
    for (int64_t begin = 0; begin < d.tiles; begin += d.chunk) {
      const int64_t tiles = smaller(d.chunk, d.tiles - begin);
#pragma omp for schedule(dynamic)
      for (int64_t part = 0; part < ceil_div(tiles, kBiasTiles); ++part) {
        float* sums = p.gb ? b.bias + (begin / kBiasTiles + part) * d.panels * kPanel : nullptr;
        for (int64_t k = 0; sums && k < d.panels * kPanel; ++k) sums[k] = 0;
        for (int64_t t = part * kBiasTiles; t < smaller(tiles, (part + 1) * kBiasTiles); ++t) {
          const Tile tile = d.tile(begin + t);
          p.relu_in ? transform_patch<true>(x, p.shape, tile, b.v + t * d.pitch, d.v_stride)
                    : transform_patch<false>(x, p.shape, tile, b.v + t * d.pitch, d.v_stride);
          transform_gradient<T>(p, d, tile, b.m + t * kPanel, sums);
        }
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < kPoints * d.panels; ++i) {
        const int64_t point = i / d.panels, panel = i % d.panels;
        multiply(p, d, b.v + point * d.v_stride, b.m + point * d.m_stride + panel * d.chunk * kPanel,
                 b.u + point * d.u_stride + panel * p.shape.c * kPanel, tiles, begin == 0);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < d.panels * p.shape.c; ++i) finish(p, d, b.u, i % p.shape.c, i / p.shape.c);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < (p.gb ? p.k : 0); ++k) {
      float sum = 0;
      for (int64_t part = 0; part < d.parts; ++part) sum += b.bias[part * d.panels * kPanel + k];
      p.gb[k] = sum;
    }
  }
}

}  // namespace

void weight_grad(const WeightGrad& p, int threads) {
  p.dtype == DType::kFloat32 ? differentiate<float>(p, threads) : differentiate<BFloat16>(p, threads);
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
