// F(4x4, 3x3): four by four outputs of a 3x3 convolution from 36 products (Winograd 1980; Lavin and Gray, CVPR 2016,
// section 4.1), Y = A^T [(G g G^T) . (B^T d B)] A, at the points 0, +-sqrt(1/2), +-sqrt(2) and infinity. Their products
// are 1 and powers of two, which halves the rounding error of the usual +-1, +-2.
#pragma once

#include "cpu/simd.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {

constexpr int64_t kTile = 4;                  // outputs along a side
constexpr int64_t kPatch = 6;                 // inputs along a side
constexpr int64_t kPoints = kPatch * kPatch;  // products
constexpr float kRootHalf = 0.70710678118654752f, kRootTwo = 1.41421356237309505f;

// t = B^T d, along one side; elements of `d` are `from` apart, of `t` `to`.
static inline void winograd_input(const Float* d /* [6] */, Float* t /* [6] */, int64_t from, int64_t to) {
  const Float d0 = d[0], d1 = d[from], d2 = d[2 * from], d3 = d[3 * from], d4 = d[4 * from], d5 = d[5 * from];
  const Float even_p = d4 - 2.0f * d2, odd_p = kRootHalf * d3 - kRootTwo * d1;
  const Float even_q = d4 - 0.5f * d2, odd_q = kRootTwo * d3 - kRootHalf * d1;
  t[0] = d0 - 2.5f * d2 + d4;
  t[to] = even_p + odd_p;
  t[2 * to] = even_p - odd_p;
  t[3 * to] = even_q + odd_q;
  t[4 * to] = even_q - odd_q;
  t[5 * to] = d1 - 2.5f * d3 + d5;
}

// u = G g, along one side.
static inline void winograd_weights(const Float* g /* [3] */, Float* u /* [6] */, int64_t from, int64_t to) {
  const Float g0 = g[0], g1 = g[from], g2 = g[2 * from];
  const Float even_p = (g0 + 0.5f * g2) * (-2.0f / 3), odd_p = g1 * (kRootHalf * (-2.0f / 3));
  const Float even_q = (g0 + 2.0f * g2) * (1.0f / 6), odd_q = g1 * (kRootTwo * (1.0f / 6));
  u[0] = g0;
  u[to] = even_p + odd_p;
  u[2 * to] = even_p - odd_p;
  u[3 * to] = even_q + odd_q;
  u[4 * to] = even_q - odd_q;
  u[5 * to] = g2;
}

// y = A^T m, along one side.
static inline void winograd_output(const Float* m /* [6] */, Float* y /* [4] */, int64_t from, int64_t to) {
  const Float sum_p = m[from] + m[2 * from], difference_p = m[from] - m[2 * from];
  const Float sum_q = m[3 * from] + m[4 * from], difference_q = m[3 * from] - m[4 * from];
  y[0] = m[0] + sum_p + sum_q;
  y[to] = kRootHalf * difference_p + kRootTwo * difference_q;
  y[2 * to] = 0.5f * sum_p + 2.0f * sum_q;
  y[3 * to] = 0.5f * kRootHalf * difference_p + 2.0f * kRootTwo * difference_q + m[5 * from];
}

// The weight gradient is the transposed algorithm, G^T [sum over tiles (B^T d B) . (A dY A^T)] G.

// m = A y, along one side.
static inline void winograd_output_transposed(const Float* y /* [4] */, Float* m /* [6] */, int64_t from, int64_t to) {
  const Float y0 = y[0], y1 = y[from], y2 = y[2 * from], y3 = y[3 * from];
  const Float even_p = y0 + 0.5f * y2, odd_p = kRootHalf * (y1 + 0.5f * y3);
  const Float even_q = y0 + 2.0f * y2, odd_q = kRootTwo * (y1 + 2.0f * y3);
  m[0] = y0;
  m[to] = even_p + odd_p;
  m[2 * to] = even_p - odd_p;
  m[3 * to] = even_q + odd_q;
  m[4 * to] = even_q - odd_q;
  m[5 * to] = y3;
}

// g = G^T u, along one side.
static inline void winograd_weights_transposed(const Float* u /* [6] */, Float* g /* [3] */, int64_t from, int64_t to) {
  const Float sum_p = u[from] + u[2 * from], difference_p = u[from] - u[2 * from];
  const Float sum_q = u[3 * from] + u[4 * from], difference_q = u[3 * from] - u[4 * from];
  g[0] = u[0] - (2.0f / 3) * sum_p + (1.0f / 6) * sum_q;
  g[to] = (kRootTwo / 6) * difference_q - (kRootHalf * 2.0f / 3) * difference_p;
  g[2 * to] = (1.0f / 3) * (sum_q - sum_p) + u[5 * from];
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
