// The product inside a convolution: a few rows of inputs times a panel of packed weights, accumulated in registers.
#pragma once

#include "cpu/simd.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {

constexpr int64_t kPanel = 2 * kLanes;  // output channels of a panel
// Rows of a product: 2 * kMaxRows accumulators, two vectors of weights and a broadcast fill the registers.
#if defined(__AVX512F__)
constexpr int kMaxRows = 8;
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 4;
#endif

// m[r][k] = sum over c of v[r][c] u[c][k] for kRows rows and one panel.
template <int kRows>
static void gemm_rows(const float* v /* [kRows][pitch] */, int64_t pitch, const float* u /* [depth][kPanel] */,
                      int64_t depth, float* m /* [kRows][kPanel] */) {
  constexpr int64_t kAhead = 16 * 1024 / 4;  // weights come from the outer cache, once per block of tiles
  Float sum[kRows][2] = {};
  for (int64_t c = 0; c < depth; ++c, u += kPanel) {
    const Float left = load(u), right = load(u + kLanes);
    for (int64_t line = 0; line < kPanel; line += 16) __builtin_prefetch(u + kAhead + line);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Float value = splat(v[r * pitch + c]);
      sum[r][0] += value * left;
      sum[r][1] += value * right;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    store(m + r * kPanel, sum[r][0]);
    store(m + r * kPanel + kLanes, sum[r][1]);
  }
}

// The same for any number of rows, in groups as equal as can be: 16 rows are 6, 5 and 5 rather than 6, 6 and 4.
static void gemm(const float* v /* [rows][pitch] */, int64_t pitch, const float* u /* [depth][kPanel] */, int64_t depth,
                 float* m /* [rows][kPanel] */, int64_t rows) {
  for (int64_t groups = ceil_div(rows, kMaxRows); groups > 0; --groups) {
    const int64_t now = ceil_div(rows, groups);
    switch (now) {
      case 1:
        gemm_rows<1>(v, pitch, u, depth, m);
        break;
      case 2:
        gemm_rows<2>(v, pitch, u, depth, m);
        break;
      case 3:
        gemm_rows<3>(v, pitch, u, depth, m);
        break;
      case 4:
        gemm_rows<4>(v, pitch, u, depth, m);
        break;
#if defined(__AVX2__)
      case 5:
        gemm_rows<5>(v, pitch, u, depth, m);
        break;
      case 6:
        gemm_rows<6>(v, pitch, u, depth, m);
        break;
#endif
#if defined(__AVX512F__)
      case 7:
        gemm_rows<7>(v, pitch, u, depth, m);
        break;
      case 8:
        gemm_rows<8>(v, pitch, u, depth, m);
        break;
#endif
    }
    v += now * pitch;
    m += now * kPanel;
    rows -= now;
  }
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
