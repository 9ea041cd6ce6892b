// What happens to a convolution's sums on their way to memory: steps one after another, each a policy that does nothing
// where it is not asked for, then the stores.
#pragma once

#include "cuda/arguments.h"
#include "cuda/index.h"
#include "cuda/launch.h"

namespace refinenet_fast::cuda {

// V output channels of one pixel.
template <class T, int V>
struct Spot {
  float (&value)[V];
  Pixel pixel;
  int64_t at;  // in [N, H, W, K]
  int32_t channel, channels;

  // value[i] = step(value[i], what `map` [N, H, W, K] has here)
  template <class Step>
  __device__ __forceinline__ void with(const void* map, const Step& step) {
    const Pack<T, V> other = load<T, V>(static_cast<const T*>(map) + at);
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = step(value[i], widen(other.lane[i]));
  }
};

// NaN stays.
__device__ __forceinline__ float relu(float v) { return v <= 0.0f ? 0.0f : v; }

struct AddBias {
  template <class T, int V>
  static __device__ __forceinline__ void apply(const WayOut& out, Spot<T, V>& spot) {
    if (!out.bias) return;
#pragma unroll
    for (int i = 0; i < V; ++i) spot.value[i] += out.bias[spot.channel + i];
  }
};

struct Rectify {
  template <class T, int V>
  static __device__ __forceinline__ void apply(const WayOut& out, Spot<T, V>& spot) {
    if (!out.relu) return;
#pragma unroll
    for (int i = 0; i < V; ++i) spot.value[i] = relu(spot.value[i]);
  }
};

// ReLU's backward; a NaN in the mask selects.
struct Select {
  template <class T, int V>
  static __device__ __forceinline__ void apply(const WayOut& out, Spot<T, V>& spot) {
    if (!out.select) return;
    spot.with(out.select, [](float value, float mask) { return mask <= 0.0f ? 0.0f : value; });
  }
};

struct AddMaps {
  template <class T, int V>
  static __device__ __forceinline__ void apply(const WayOut& out, Spot<T, V>& spot) {
#pragma unroll
    for (int i = 0; i < kMostAdds; ++i) {  // unrolled: parameters are addressed by constants
      if (i >= out.adds) return;
      const bool raw = i < out.raw_adds;
      spot.with(out.add[i], [raw](float value, float other) { return value + (raw ? other : relu(other)); });
    }
  }
};

// All four corners are read: infinity times a weight of 0 is NaN as in PyTorch.
struct AddUpsampled {
  template <class T, int V>
  static __device__ __forceinline__ void apply(const WayOut& out, Spot<T, V>& spot) {
    if (!out.low) return;
    const BilinearTaps row = bilinear_taps(out.rows, spot.pixel.row);
    const BilinearTaps column = bilinear_taps(out.columns, spot.pixel.column);
    const T* map = static_cast<const T*>(out.low) + spot.channel;  // [N, h, w, K]
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t line = spot.pixel.image * out.rows.in + (corner < 2 ? row.near : row.far);
      const int64_t place = line * out.columns.in + (corner % 2 ? column.far : column.near);
      const float down = corner < 2 ? 1 - row.weight : row.weight;
      const float across = corner % 2 ? column.weight : 1 - column.weight;
      const Pack<T, V> low = load<T, V>(map + place * spot.channels);
#pragma unroll
      for (int i = 0; i < V; ++i) spot.value[i] += down * across * widen(low.lane[i]);
    }
  }
};

struct Store {
  template <class T, int V>
  static __device__ __forceinline__ void apply(const WayOut& out, Spot<T, V>& spot) {
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) narrow(spot.value[i], &pack.lane[i]);
    store<T, V>(static_cast<T*>(out.y) + spot.at, pack);
    if (!out.relued) return;
#pragma unroll
    for (int i = 0; i < V; ++i) narrow(relu(spot.value[i]), &pack.lane[i]);
    store<T, V>(static_cast<T*>(out.relued) + spot.at, pack);
  }
};

// Sums of one of several splits, as they are: conv3x3_splits.cu reads them.
template <int V>
__device__ __forceinline__ void store_part(const float (&value)[V], float* to) {
  constexpr int kAtOnce = V < 4 ? V : 4;
#pragma unroll
  for (int i = 0; i < V; i += kAtOnce) {
    Pack<float, kAtOnce> pack;
#pragma unroll
    for (int lane = 0; lane < kAtOnce; ++lane) pack.lane[lane] = value[i + lane];
    store<float, kAtOnce>(to + i, pack);
  }
}

// Where those of split number `split` lie, [N, H, W, K]; null where there is one split, whose sums go the way out.
__device__ __forceinline__ float* part_of(const PackedConvolution& p, int32_t split) {
  return p.splits > 1 ? p.parts + split * (pixels_of(p.shape) * p.k) : nullptr;
}

template <class... Steps>
struct InThisOrder {
  template <class T, int V>
  static __device__ __forceinline__ void apply(const WayOut& out, Spot<T, V>& spot) {
    (Steps::apply(out, spot), ...);
  }
};

using AllSteps = InThisOrder<AddBias, Rectify, Select, AddMaps, AddUpsampled, Store>;

}  // namespace refinenet_fast::cuda
