// What the implicit matrix products are asked to do. Tensors are dense NHWC, as raw pointers; none is empty.
#pragma once

#include "common/arguments.h"

namespace refinenet_fast::cuda {

constexpr int kMostAdds = 8;  // tensors that one way out sums

// In this order: + bias, ReLU, 0 where select <= 0, + the first `raw_adds` of `add`, + the ReLU of the others, + low
// resized bilinearly; then y, and its ReLU where `relued` is not null.
struct WayOut {
  void* y;                     // [N, H, W, K]
  void* relued;                // [N, H, W, K] or null
  const float* bias;           // [K] or null
  const void* select;          // [N, H, W, K] or null
  const void* add[kMostAdds];  // each [N, H, W, K]
  const void* low;             // [N, h, w, K] or null
  BilinearAxis rows, columns;  // of low's resize
  int adds, raw_adds;
  bool relu;
};

// The 3x3 (or 1x1) convolution of x, stride 1, zero padding 1 (or 0), after ReLU where `relu_in` and a 5x5 max pool
// where `pool_in`; then the way out.
struct PackedConvolution {
  const void* x;        // [N, H, W, C]
  const void* weights;  // [TAPS, K, PITCH]; PITCH: C rounded up to whole chunks of 16 bytes, zeros behind it
  float* parts;         // [SPLITS, N, H, W, K] of several splits, written; or null
  WayOut out;
  Shape shape;  // of x
  int64_t k;    // output channels
  int side;     // 3 or 1
  DType dtype;  // of all but the bias
  int tile;     // pixels and output channels of a block: 128 or 64; with a pool output channels only, 256 or 64, and on
                // sm_90a output channels only, 256, 128 or 64; 0: as the plan chooses
  int splits;   // of the input channels, summed apart and then in their order; 0: as the plan chooses
  bool exact;   // float32 as three products of TF32, otherwise as one
  bool turned;  // taps from the last to the first: the input gradient
  bool relu_in, pool_in;
  bool sm80_loop;  // also where that of sm_90a takes this
};

// The gradient of that convolution in its weight, and in its bias where `gb` is not null, summed over the pixels: parts
// of the sums first, then those in their order.
struct PackedWeightGrad {
  const void* x;       // [N, H, W, C], before the ReLU
  const void* gy;      // [N, H, W, K]
  float* parts;        // [SPLITS, K, TAPS, C], behind it for the bias [SPLITS, SHARES, K]; written
  void* gw;            // [K, C, TAPS], written
  float* gb;           // [K] or null, written
  int64_t strides[3];  // of gw, in elements
  Shape shape;         // of x
  int64_t k;
  int side, splits;
  DType dtype, gw_dtype;  // of x and gy; of gw
  int tile;               // input and output channels of a block: 128 or 64; 0: as the plan chooses
  bool exact, relu_in;
};

}  // namespace refinenet_fast::cuda
