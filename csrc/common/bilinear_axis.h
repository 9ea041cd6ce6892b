// One axis of a bilinear resize: which inputs an output reads, and which outputs read an input. All indices and
// weights come from integer quotient and remainder, so every backend has the same ones and the adjoint's range is
// exact.
#pragma once

#include <cstdint>

// Static: each translation unit has its own copy, since they are compiled for different instruction sets.
#ifdef __CUDACC__
#define REFINENET_FAST_BOTH static __host__ __device__ inline
#else
#define REFINENET_FAST_BOTH static inline
#endif

namespace refinenet_fast {

struct BilinearAxis {
  int64_t in, out;
  bool align_corners;
};

struct BilinearTaps {
  int64_t near, far;  // inputs; far == near at the last one, and on an axis that keeps its size: 0 x infinity is NaN
  float weight;       // of far; near has 1 - weight
};

// Output o reads from position numerator / denominator of the input:
//   align_corners:  o (in - 1) / (out - 1)          otherwise:  max(0, ((2 o + 1) in - out) / (2 out))
REFINENET_FAST_BOTH BilinearTaps bilinear_taps(const BilinearAxis& axis, int64_t o) {
  int64_t numerator, denominator;
  if (axis.align_corners) {
    numerator = o * (axis.in - 1);
    denominator = axis.out > 1 ? axis.out - 1 : 1;
  } else {
    numerator = (2 * o + 1) * axis.in - axis.out;
    if (numerator < 0) numerator = 0;
    denominator = 2 * axis.out;
  }
  const int64_t near = numerator / denominator;
  const float weight = static_cast<float>(numerator - near * denominator) / static_cast<float>(denominator);
  return {near, axis.in != axis.out && near + 1 < axis.in ? near + 1 : near, weight};
}

// The first output whose `near` is `input` or more; `out` if there is none. Solves the formula above for o.
REFINENET_FAST_BOTH int64_t bilinear_first_output(const BilinearAxis& axis, int64_t input) {
  if (input <= 0) return 0;
  if (input >= axis.in) return axis.out;
  int64_t numerator, denominator;
  if (axis.align_corners) {
    numerator = input * (axis.out > 1 ? axis.out - 1 : 1);
    denominator = axis.in - 1;
  } else {
    numerator = (2 * input + 1) * axis.out - axis.in;
    denominator = 2 * axis.in;
  }
  const int64_t first = numerator <= 0 ? 0 : (numerator + denominator - 1) / denominator;
  return first < axis.out ? first : axis.out;
}

// Outputs begin ... end - 1 read `input`: those whose near is `input` or the one before.
struct BilinearReaders {
  int64_t begin, end;
};

REFINENET_FAST_BOTH BilinearReaders bilinear_readers(const BilinearAxis& axis, int64_t input) {
  if (axis.in == axis.out) return {input, input + 1};
  return {bilinear_first_output(axis, input - 1), bilinear_first_output(axis, input + 1)};
}

}  // namespace refinenet_fast
