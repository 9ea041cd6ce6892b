// A convolution's weights in the order in which products read them.
#pragma once

#include "common/arguments.h"
#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {

// to[j][i] = from[i][j] for kSquare rows and columns.
#if defined(__AVX2__)
constexpr int64_t kSquare = 8;
static inline void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m256 r[8], pairs[8], quads[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_row);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], _MM_SHUFFLE(1, 0, 1, 0));
      quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], _MM_SHUFFLE(3, 2, 3, 2));
    }
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x20));
    _mm256_storeu_ps(to + (4 + i) * to_row, _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x31));
  }
}
#else
constexpr int64_t kSquare = 4;
static inline void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
  for (int64_t i = 0; i < kSquare; ++i) {
    for (int64_t j = 0; j < kSquare; ++j) to[j * to_row + i] = from[i * from_row + j];
  }
}
#endif

constexpr int64_t kGathered = 16;  // input channels at a time

// to[j][lane] = from[lane][j] for a panel of lanes, which are `lane_stride` apart, and j below `columns`.
static inline void gather_rows(const float* from, int64_t lane_stride, int64_t columns, float* to, int64_t to_row) {
  int64_t j = 0;
  for (; j + kSquare <= columns; j += kSquare) {
    for (int64_t lane = 0; lane < kPanel; lane += kSquare) {
      transpose(from + lane * lane_stride + j, lane_stride, to + j * to_row + lane, to_row);
    }
  }
  for (; j < columns; ++j) {
    for (int64_t lane = 0; lane < kPanel; ++lane) to[j * to_row + lane] = from[lane * lane_stride + j];
  }
}

// The weights of a panel of output channels and some input channels; channels past the last are 0. Where elements that
// are read for one output lie side by side, as in contiguous and in channels-last weights, they are read as vectors:
// lanes are often a multiple of 4 KB apart and would fall into the same few sets of the cache.
template <int kTaps>
static inline void gather_weights(const Convolution& p, int64_t panel, int64_t begin, int64_t channels,
                                  float* to /* [channels][kTaps][kPanel] */) {
  constexpr int64_t kRow = kTaps == 9 ? 3 : 1;
  const int64_t first = panel * kPanel, *s = p.strides;
  const float* from = p.weights + first * s[0] + begin * s[1];
  if (first + kPanel <= p.k) {
    if (s[1] == kTaps && (kTaps == 1 || (s[2] == kRow && s[3] == 1))) {
      return gather_rows(from, s[0], channels * kTaps, to, kPanel);
    }
    if (s[1] == 1) {
      for (int64_t t = 0; t < kTaps; ++t) {
        gather_rows(from + t / 3 * s[2] + t % 3 * s[3], s[0], channels, to + t * kPanel, kTaps * kPanel);
      }
      return;
    }
  }
  for (int64_t i = 0; i < channels * kTaps; ++i) {
    const int64_t t = i % kTaps, at = i / kTaps * s[1] + t / 3 * s[2] + t % 3 * s[3];
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      to[i * kPanel + lane] = first + lane < p.k ? from[lane * s[0] + at] : 0;
    }
  }
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
