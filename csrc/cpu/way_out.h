// What a convolution does on the way out, for a few outputs of one vector of channels.
#pragma once

#include "common/arguments.h"
#include "cpu/corners.h"
#include "cpu/simd.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {

// Taps of every row and every column of the tensor that is resized on the way out.
struct Taps {
  const BilinearTaps *rows /* [H] */, *columns /* [W] */;

  static int64_t bytes(const Convolution& p) {
    return p.low ? round_up((p.shape.h + p.shape.w) * sizeof(BilinearTaps), 64) : 0;
  }
  Taps(const Convolution& p, char* memory /* [bytes] */) : rows(nullptr), columns(nullptr) {
    if (!p.low) return;
    BilinearTaps* taps = reinterpret_cast<BilinearTaps*>(memory);
    for (int64_t i = 0; i < p.shape.h; ++i) taps[i] = bilinear_taps(p.rows, i);
    for (int64_t j = 0; j < p.shape.w; ++j) taps[p.shape.h + j] = bilinear_taps(p.columns, j);
    rows = taps;
    columns = taps + p.shape.h;
  }
};

// One output's place in the batch.
struct Place {
  int64_t n, y, x;
};

// Only where a vector is a whole line: a tile's outputs are 16 pixels, whose part-filled lines would be written in
// parts.
template <class T>
static inline bool streams(const T* y /* [N, H, W, K] */, const Convolution& p) {
  return kVectorBytes == 64 && streams(y, p.shape.n * p.shape.h * p.shape.w, p.k);
}

// Outputs has each(body), which calls body(i, pixel) for the outputs i that are inside the image, `pixel` numbering
// those of the batch, and place(i). A thread that is through calls fence().
template <class T, class Outputs, class Count>
static inline void way_out(const Convolution& p, const Taps& taps, const Outputs& outputs, int64_t k, Count lanes,
                           Float* out /* [Outputs::kCount] */) {
  if (p.bias) {
    const Float bias = load(p.bias + k, lanes);
    for (int64_t i = 0; i < Outputs::kCount; ++i) out[i] += bias;
  }
  if (p.relu_out) {
    for (int64_t i = 0; i < Outputs::kCount; ++i) out[i] = relu(out[i]);
  }
  if (p.select) {
    const T* select = static_cast<const T*>(p.select) + k;
    outputs.each(
        [&](int64_t i, int64_t pixel) { out[i] = keep(~(load(select + pixel * p.k, lanes) <= Float{}), out[i]); });
  }
  for (int64_t a = 0; a < p.adds; ++a) {
    const T* add = static_cast<const T*>(p.add[a]) + k;
    if (a < p.raw_adds) {
      outputs.each([&](int64_t i, int64_t pixel) { out[i] += load(add + pixel * p.k, lanes); });
    } else {
      outputs.each([&](int64_t i, int64_t pixel) { out[i] += relu(load(add + pixel * p.k, lanes)); });
    }
  }
  if (p.low) {
    outputs.each([&](int64_t i, int64_t) {
      const Place at = outputs.place(i);
      const T* image = static_cast<const T*>(p.low) + at.n * p.rows.in * p.columns.in * p.k + k;
      out[i] += blend(image, corners(taps.rows[at.y], taps.columns[at.x], p.columns.in, p.k), 0, lanes);
    });
  }
  T* y = static_cast<T*>(p.y);
  const bool streamed = streams(y, p);
  outputs.each([&](int64_t i, int64_t pixel) { put(y + pixel * p.k + k, out[i], lanes, streamed); });
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
