// What each kernel is asked to do, on the CPU and on a GPU alike. Tensors are dense NHWC, as raw pointers.
#pragma once

#include <cstdint>

#include "common/bilinear_axis.h"

namespace refinenet_fast {

// Element types; the numbers are those of refinenet_fast/_native.py.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Sizes in memory order.
struct Shape {
  int64_t n, h, w, c;
};

// (ReLU,) 5x5 max pool, stride 1, padding 2. The argmax byte is dx | dy << 3: dx of the row pass at this pixel, dy of
// the column pass; the smallest on ties, the last NaN.
struct MaxPool5 {
  const void* x;    // [N, H, W, C]
  void* y;          // [N, H, W, C]
  uint8_t* argmax;  // [N, H, W, C] or null
  Shape shape;
  DType dtype;
  bool relu;
};

// gx = add + gradient of the pool in its input (in its ReLU's result, where there is one).
struct MaxPool5Backward {
  const void* gy;         // [N, H, W, C]
  const uint8_t* argmax;  // [N, H, W, C]
  const void* add;        // [N, H, W, C] or null
  void* gx;               // [N, H, W, C]
  Shape shape;
  DType dtype;
};

// y = the convolution of x, 3x3 (or 1x1), stride 1, padding 1 (or 0), after ReLU where `relu_in` and a 5x5 max pool
// where `pool_in`; then, in this order, + bias, ReLU, 0 where select <= 0, + the first `raw_adds` of `add`, + the ReLU
// of the others, + low resized bilinearly.
struct Convolution {
  const void* x;           // [N, H, W, C]
  const float* weights;    // [K, C, 3, 3] or [K, C, 1, 1]
  int64_t strides[4];      // of weights, in elements; negative ones turn them
  const float* bias;       // [K] or null
  const void* select;      // [N, H, W, K] or null
  const void* const* add;  // each [N, H, W, K]
  int64_t adds, raw_adds;
  const void* low;             // [N, h, w, K] or null
  BilinearAxis rows, columns;  // of low's resize, where it is not null
  void* y;                     // [N, H, W, K]
  Shape shape;                 // of x
  int64_t k;
  DType dtype;  // of all but weights and bias: float32 or bfloat16
  bool relu_in, pool_in, relu_out;
};

// Gradient of that convolution in its weight, and in its bias where `gb` is not null.
struct WeightGrad {
  const void* x;       // [N, H, W, C], before the ReLU
  const void* gy;      // [N, H, W, K]
  float* gw;           // [K, C, 3, 3]
  int64_t strides[4];  // of gw, in elements
  float* gb;           // [K] or null
  Shape shape;         // of x; none is 0
  int64_t k;
  DType dtype;  // of x and gy: float32 or bfloat16
  bool relu_in;
};

// y = add + x resized from `in` to rows.out x columns.out; y may be add.
struct Bilinear {
  const void* x;    // [N, h, w, C]
  const void* add;  // [N, H, W, C] or null
  void* y;          // [N, H, W, C]
  Shape in;         // {N, h, w, C}
  BilinearAxis rows, columns;
  DType dtype;
};

// gx = adjoint of Bilinear in x, applied to gy.
struct BilinearBackward {
  const void* gy;  // [N, H, W, C]
  void* gx;        // [N, h, w, C]
  Shape in;        // {N, h, w, C}
  BilinearAxis rows, columns;
  DType dtype;
};

}  // namespace refinenet_fast
