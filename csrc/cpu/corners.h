// One pixel of a bilinear resize: the four pixels it reads and their weights.
#pragma once

#include "common/bilinear_axis.h"
#include "cpu/simd.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {

struct Corners {
  int64_t at[4];  // element offsets of (near, near), (near, far), (far, near), (far, far) by row and column
  float weights[4];
};

static inline Corners corners(const BilinearTaps& row, const BilinearTaps& column, int64_t width, int64_t channels) {
  const int64_t near = row.near * width, far = row.far * width;
  return {{(near + column.near) * channels, (near + column.far) * channels, (far + column.near) * channels,
           (far + column.far) * channels},
          {(1 - row.weight) * (1 - column.weight), (1 - row.weight) * column.weight, row.weight * (1 - column.weight),
           row.weight * column.weight}};
}

// Some channels of the pixel, from those of an image [h, w, C].
template <class T, class Count>
static inline Float blend(const T* image, const Corners& k, int64_t c, Count lanes) {
  // From 0: the sum of two products may be fused either way round, and the compiler chose differently for whole
  // vectors.
  Float sum{};
  for (int i = 0; i < 4; ++i) sum += splat(k.weights[i]) * load(image + k.at[i] + c, lanes);
  return sum;
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
