// Bilinear upsample-and-add, any sizes, and its exact adjoint as a gather: one thread a pixel and vector of channels.
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace refinenet_fast::cuda {
namespace {

template <class T, int V>
__device__ void add_weighted(float (&sum)[V], float weight, const T* p) {
  const Pack<T, V> pack = load<T, V>(p);
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] += weight * widen(pack.lane[i]);
}

template <class T, int V>
__device__ void store_sum(const float (&sum)[V], T* p) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(sum[i], &pack.lane[i]);
  store<T, V>(p, pack);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) forward_kernel(Bilinear p) {
  const int64_t channels = p.in.c;
  int64_t index = thread_index();
  if (index >= p.in.n * p.rows.out * p.columns.out * (channels / V)) return;
  const int64_t flat = index * V;
  const int64_t channel = pop(&index, channels / V) * V;
  const BilinearTaps column = bilinear_taps(p.columns, pop(&index, p.columns.out));
  const BilinearTaps row = bilinear_taps(p.rows, pop(&index, p.rows.out));
  const T* near = static_cast<const T*>(p.x) + (index * p.in.h + row.near) * p.in.w * channels + channel;
  const T* far = near + (row.far - row.near) * p.in.w * channels;

  float sum[V] = {};
  add_weighted<T, V>(sum, (1 - row.weight) * (1 - column.weight), near + column.near * channels);
  add_weighted<T, V>(sum, (1 - row.weight) * column.weight, near + column.far * channels);
  add_weighted<T, V>(sum, row.weight * (1 - column.weight), far + column.near * channels);
  add_weighted<T, V>(sum, row.weight * column.weight, far + column.far * channels);
  if (p.add) add_weighted<T, V>(sum, 1.0f, static_cast<const T*>(p.add) + flat);
  store_sum<T, V>(sum, static_cast<T*>(p.y) + flat);
}

// Taps one at a time: at the last input both are the same, and infinity times a weight of 0 is NaN as in PyTorch.
// gx at (v, u): the rows that read v summed in each column that reads u, then those columns. Fixed order, no atomics.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) backward_kernel(BilinearBackward p) {
  const int64_t channels = p.in.c;
  int64_t index = thread_index();
  if (index >= p.in.n * p.in.h * p.in.w * (channels / V)) return;
  const int64_t flat = index * V;
  const int64_t channel = pop(&index, channels / V) * V, u = pop(&index, p.in.w), v = pop(&index, p.in.h);
  const BilinearReaders columns = bilinear_readers(p.columns, u), rows = bilinear_readers(p.rows, v);
  const T* gy = static_cast<const T*>(p.gy) + index * p.rows.out * p.columns.out * channels + channel;

  float sum[V] = {};
  for (int64_t x = columns.begin; x < columns.end; ++x) {
    float received[V] = {};
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const BilinearTaps row = bilinear_taps(p.rows, y);
      const T* from = gy + (y * p.columns.out + x) * channels;
      if (row.near == v) add_weighted<T, V>(received, 1 - row.weight, from);
      if (row.far == v) add_weighted<T, V>(received, row.weight, from);
    }
    const BilinearTaps column = bilinear_taps(p.columns, x);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (column.near == u) sum[i] += (1 - column.weight) * received[i];
      if (column.far == u) sum[i] += column.weight * received[i];
    }
  }
  store_sum<T, V>(sum, static_cast<T*>(p.gx) + flat);
}

template <class T>
struct Forward {
  static int run(const Bilinear& p, int device, void* stream) {
    constexpr int kLanes = 16 / sizeof(T);
    const int lanes = vector_lanes<T>(p.in.c, {p.x, p.add, p.y});
    const auto kernel = lanes == kLanes ? forward_kernel<T, kLanes> : forward_kernel<T, 1>;
    return launch(kernel, p, p.in.n * p.rows.out * p.columns.out * (p.in.c / lanes), device, stream);
  }
};

template <class T>
struct Backward {
  static int run(const BilinearBackward& p, int device, void* stream) {
    constexpr int kLanes = 16 / sizeof(T);
    const int lanes = vector_lanes<T>(p.in.c, {p.gy, p.gx});
    const auto kernel = lanes == kLanes ? backward_kernel<T, kLanes> : backward_kernel<T, 1>;
    return launch(kernel, p, p.in.n * p.in.h * p.in.w * (p.in.c / lanes), device, stream);
  }
};

}  // namespace

int bilinear(const Bilinear& p, int device, void* stream) { return by_dtype<Forward>(p, device, stream); }

int bilinear_backward(const BilinearBackward& p, int device, void* stream) {
  return by_dtype<Backward>(p, device, stream);
}

}  // namespace refinenet_fast::cuda
