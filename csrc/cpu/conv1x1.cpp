// 1x1 convolution: a matrix product [pixels][C] by [C][K] with the ways in and out of the 3x3 convolution.
//
// A block is some pixels, all input channels, copied with the way in into the second-level cache; per panel of output
// channels a few pixels' products at a time go straight into the way out.
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/pooled.h"
#include "cpu/threads.h"
#include "cpu/way_out.h"
#include "cpu/weights.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {
namespace {

constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kItemsPerThread = 4;  // at least, for the threads to end at about the same time

// How the work is divided; no sum depends on it. With a pool on the way in, a block is a band of six rows and some
// columns, else a run of pixels wherever rows end.
struct Division {
  bool pool;
  int64_t pixels, pitch, panels, panel_elements, rows, columns, across, down, blocks, slices;

  Division(const Convolution& p, int threads) : pool(p.pool_in), pixels(p.shape.n * p.shape.h * p.shape.w) {
    pitch = round_up(p.shape.c, kLanes) + 16;
    panels = ceil_div(p.k, kPanel);
    panel_elements = p.shape.c * kPanel;
    const int64_t fit = larger(8 * kMaxRows, kBlockBytes / (4 * pitch));
    rows = pool ? smaller(kBand, p.shape.h) : 1;
    const int64_t width = pool ? p.shape.w : pixels;
    across = ceil_div(width, smaller(width, larger(1, fit / rows)));
    columns = ceil_div(width, across);
    down = pool ? ceil_div(p.shape.h, rows) * p.shape.n : 1;
    blocks = across * down;
    slices = threads == 1 ? 1 : smaller(panels, ceil_div(kItemsPerThread * threads, blocks));
  }
};

// The pixels of a block: `rows` times `columns`, from row `top` of image n and column `left` on.
struct Block {
  int64_t n, top, left, rows, columns;

  Block(const Convolution& p, const Division& d, int64_t index) {
    const int64_t bands = d.pool ? ceil_div(p.shape.h, d.rows) : 1, band = index / d.across;
    n = band / bands;
    top = band % bands * d.rows;
    left = index % d.across * d.columns;
    rows = d.pool ? smaller(d.rows, p.shape.h - top) : 1;
    columns = smaller(d.columns, (d.pool ? p.shape.w : d.pixels) - left);
  }
  // The first pixel of a row, numbered in the batch.
  int64_t pixel(const Shape& s, int64_t row) const { return (n * s.h + top + row) * s.w + left; }
};

// What a thread works in.
struct Scratch {
  float* v;       // [pixels of a block][pitch]: inputs
  float* m;       // [kMaxRows][kPanel]: products
  float* pooled;  // [Band::elements()]

  static int64_t bytes(const Division& d) {
    const int64_t pooled = d.pool ? Band{0, 0, 0, d.columns}.elements() : 0;
    return round_up((d.rows * d.columns * d.pitch + kMaxRows * kPanel + pooled) * 4, 64);
  }
  Scratch(const Division& d, char* memory)
      : v(reinterpret_cast<float*>(memory)), m(v + d.rows * d.columns * d.pitch), pooled(m + kMaxRows * kPanel) {}
};

template <bool kRelu>
inline Float way_in(Float value) {
  return kRelu ? relu(value) : value;
}

// A block's inputs to v[pixel][c].
template <bool kRelu, class T>
void copy_block(const Convolution& p, const Division& d, const Block& block, const Scratch& s) {
  const int64_t c_end = p.shape.c;
  if (!d.pool) {
    const T* x = static_cast<const T*>(p.x) + block.pixel(p.shape, 0) * c_end;
    for (int64_t i = 0; i < block.columns; ++i) {
      for_channels(c_end, [&](int64_t c, auto lanes) {
        store(s.v + i * d.pitch + c, way_in<kRelu>(load(x + i * c_end + c, lanes)));
      });
    }
    return;
  }
  const Band band{block.n, block.top, block.left, block.columns};
  for (int64_t begin = 0; begin < c_end; begin += kPoolChunk) {
    pool_band(static_cast<const T*>(p.x), p.shape, band, begin, s.pooled);
    for (int64_t i = 0; i < block.rows * block.columns; ++i) {
      const float* from = s.pooled + (i / block.columns * band.inputs() + i % block.columns) * kPoolChunk;
      for (int64_t c = 0; c < smaller(kPoolChunk, c_end - begin); c += kLanes) {
        store(s.v + i * d.pitch + begin + c, way_in<kRelu>(load(from + c)));
      }
    }
  }
}

// Neighbouring pixels of a row, or of the batch.
struct Outputs {
  static constexpr int64_t kCount = kMaxRows;
  const Shape& shape;
  int64_t first, count;

  template <class Body>
  void each(const Body& body) const {
    for (int64_t i = 0; i < count; ++i) body(i, first + i);
  }
  Place place(int64_t i) const {
    const int64_t pixel = first + i;
    return {pixel / shape.w / shape.h, pixel / shape.w % shape.h, pixel % shape.w};
  }
};

// Panels first ... last - 1 of a row of a block.
template <class T>
void multiply_row(const Convolution& p, const Division& d, const Taps& taps, const float* u, const float* v,
                  int64_t pixel, int64_t columns, float* m, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t i = 0, groups = ceil_div(columns, kMaxRows); groups > 0; --groups) {
      const Outputs outputs{p.shape, pixel + i, ceil_div(columns - i, groups)};
      gemm(v + i * d.pitch, d.pitch, u + panel * d.panel_elements, p.shape.c, m, kPanel, outputs.count);
      for_channels(smaller(kPanel, p.k - panel * kPanel), [&](int64_t c, auto lanes) {
        Float out[kMaxRows];
        for (int64_t r = 0; r < kMaxRows; ++r) out[r] = load(m + r * kPanel + c);
        way_out<T>(p, taps, outputs, panel * kPanel + c, lanes, out);
      });
      i += outputs.count;
    }
  }
}

template <class T>
void convolve(const Convolution& p, int threads) {
  const Division d(p, threads);
  const int64_t u_bytes = round_up(d.panels * d.panel_elements * 4, 64);
  const Workspace workspace(Taps::bytes(p) + u_bytes + Scratch::bytes(d) * threads);
  char* memory = workspace.data();
  const Taps taps(p, memory);
  memory += Taps::bytes(p);
  float* u = reinterpret_cast<float*>(memory);  // [panels][C][kPanel]: weights
#pragma omp parallel num_threads(threads)
  {
    const Scratch s(d, memory + u_bytes + Scratch::bytes(d) * thread_number());
    for (int64_t i = 0; i < kMaxRows * kPanel; ++i) s.m[i] = 0;  // rows that a block does not fill are read as well
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < d.panels; ++panel) {
      gather_weights<1>(p, panel, 0, p.shape.c, u + panel * d.panel_elements);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < d.blocks * d.slices; ++i) {
      const Block block(p, d, i % d.blocks);
      const int64_t slice = i / d.blocks;
      p.relu_in ? copy_block<true, T>(p, d, block, s) : copy_block<false, T>(p, d, block, s);
      for (int64_t row = 0; row < block.rows; ++row) {
        multiply_row<T>(p, d, taps, u, s.v + row * block.columns * d.pitch, block.pixel(p.shape, row), block.columns,
                        s.m, d.panels * slice / d.slices, d.panels * (slice + 1) / d.slices);
      }
    }
    fence();
  }
}

}  // namespace

void conv1x1(const Convolution& p, int threads) {
  if (p.shape.n == 0) return;
  p.dtype == DType::kFloat32 ? convolve<float>(p, threads) : convolve<BFloat16>(p, threads);
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
