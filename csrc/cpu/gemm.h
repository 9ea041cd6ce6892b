// The product inside a convolution: a few rows of inputs times a panel of packed weights, accumulated in registers.
#pragma once

#include "cpu/simd.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {

constexpr int64_t kPanel = 2 * kLanes;  // output channels of a panel
// Rows of a product: 2 * kMaxRows accumulators, two vectors of weights and a broadcast fill the registers. What the
// first-level cache delivers limits AVX-512, and more rows share each vector of weights.
#if defined(__AVX512F__)
constexpr int kMaxRows = 14;
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 4;
#endif
constexpr int64_t kPanelDepth = 256;  // input channels of a panel that stay in the first-level cache for all rows

// How far ahead weights are fetched, about what a group of rows multiplies while the outer cache answers.
#if defined(__AVX512F__)
constexpr int64_t kAhead = 32 * 1024;
#else
constexpr int64_t kAhead = 16 * 1024;
#endif

// m[r][k] (+)= sum over c of v[r][c] u[c][k] for kRows rows and one panel. At every c the line at `ahead`, which moves
// by `step` bytes, is fetched into the second-level cache: weights of a panel to come.
template <int kRows>
static void gemm_rows(const float* v /* [kRows][pitch] */, int64_t pitch, const float* u /* [depth][kPanel] */,
                      int64_t depth, float* m /* [kRows][m_pitch] */, int64_t m_pitch, bool add, const char* ahead,
                      int64_t step) {
  Float sum[kRows][2] = {};
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = load(m + r * m_pitch);
      sum[r][1] = load(m + r * m_pitch + kLanes);
    }
  }
#pragma GCC unroll 4
  for (int64_t c = 0; c < depth; ++c, u += kPanel) {
    const Float left = load(u), right = load(u + kLanes);
    __builtin_prefetch(ahead, 0, 2);
    ahead += step;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Float value = splat(v[r * pitch + c]);
      sum[r][0] += value * left;
      sum[r][1] += value * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    store(m + r * m_pitch, sum[r][0]);
    store(m + r * m_pitch + kLanes, sum[r][1]);
  }
}

// gemm_rows() for any number of rows up to kRows.
template <int kRows = kMaxRows>
static void gemm_group(int64_t rows, const float* v /* [rows][pitch] */, int64_t pitch,
                       const float* u /* [depth][kPanel] */, int64_t depth, float* m /* [rows][m_pitch] */,
                       int64_t m_pitch, bool add, const char* ahead, int64_t step) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return gemm_group<kRows - 1>(rows, v, pitch, u, depth, m, m_pitch, add, ahead, step);
  }
  gemm_rows<kRows>(v, pitch, u, depth, m, m_pitch, add, ahead, step);
}

// The same for any number of rows, in groups as equal as can be (16 rows are 6, 5 and 5 rather than 6, 6 and 4), and
// for any depth. A sum's terms are added in their order, however rows and depth are divided. The weights come from an
// outer cache: each group fetches its share of those that are kAhead further on.
[[maybe_unused]] static void gemm(const float* v /* [rows][pitch] */, int64_t pitch,
                                  const float* u /* [depth][kPanel] */, int64_t depth, float* m /* [rows][m_pitch] */,
                                  int64_t m_pitch, int64_t rows, bool add = false) {
  for (int64_t c = 0; c < depth; c += kPanelDepth) {
    const int64_t now = smaller(kPanelDepth, depth - c), groups = ceil_div(rows, kMaxRows);
    const int64_t step = ceil_div(kPanel * 4, groups);
    const float* panel = u + c * kPanel;
    const char* ahead = reinterpret_cast<const char*>(panel) + kAhead;
    for (int64_t r = 0, left = groups; left > 0; --left) {
      const int64_t count = ceil_div(rows - r, left);
      gemm_group(count, v + r * pitch + c, pitch, panel, now, m + r * m_pitch, m_pitch, add || c > 0, ahead, step);
      ahead += now * step;
      r += count;
    }
  }
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
