// 5x5 max pool, stride 1, padding 2, plain and without barriers: each thread walks down a strip of one image column
// with the row maxima of five rows in registers. Five loads an output instead of twenty-five.
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace refinenet_fast::cuda {
namespace {

constexpr int kRadius = 2, kTaps = 5;
constexpr int64_t kStrip = 16;  // rows a thread writes; it reads four more

// Row maxima of one row at one column: which tap, too, counted from column - 2.
template <int V>
struct RowMax {
  float value[V];
  uint8_t dx[V];
};

// Whether v replaces best: it is larger, or NaN, so that the first of equals and the last NaN win.
__device__ inline bool better(float v, float best) { return v > best || v != v; }

template <class T, int V, bool kRelu>
__device__ RowMax<V> row_max(const T* row /* [W, C] at this thread's channels */, int64_t column, const Shape& s) {
  RowMax<V> best;
  bool first = true;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const int64_t x = column + tap - kRadius;
    if (x < 0 || x >= s.w) continue;
    const Pack<T, V> pack = load<T, V>(row + x * s.c);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float v = widen(pack.lane[i]);
      if (kRelu && v <= 0.0f) v = 0.0f;
      if (first || better(v, best.value[i])) {
        best.value[i] = v;
        best.dx[i] = static_cast<uint8_t>(tap);
      }
    }
    first = false;
  }
  return best;
}

// The maximum over rows y - 2 ... y + 2, of which those from first_tap to last_tap are inside the image.
template <class T, int V, bool kArgmax>
__device__ void write(const RowMax<V> (&ring)[kTaps], int first_tap, int last_tap, T* y, uint8_t* argmax) {
  Pack<T, V> value;
  Pack<uint8_t, V> byte;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float best = 0.0f;
    int dy = -1;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      if (tap < first_tap || tap > last_tap) continue;
      if (dy < 0 || better(ring[tap].value[i], best)) {
        best = ring[tap].value[i];
        dy = tap;
      }
    }
    narrow(best, &value.lane[i]);
    byte.lane[i] = static_cast<uint8_t>(ring[kRadius].dx[i] | dy << 3);
  }
  store<T, V>(y, value);
  if (kArgmax) store<uint8_t, V>(argmax, byte);
}

template <class T, int V, bool kRelu, bool kArgmax>
__global__ void __launch_bounds__(kThreads) forward_kernel(MaxPool5 p) {
  const Shape& s = p.shape;
  const int64_t strips = (s.h + kStrip - 1) / kStrip;
  int64_t index = thread_index();
  if (index >= s.n * strips * s.w * (s.c / V)) return;
  const int64_t channel = pop(&index, s.c / V) * V, column = pop(&index, s.w), begin = pop(&index, strips) * kStrip;
  const int64_t image = index * s.h * s.w * s.c + channel;
  const T* x = static_cast<const T*>(p.x) + image;
  const int64_t end = begin + kStrip < s.h ? begin + kStrip : s.h;

  RowMax<V> ring[kTaps];  // of rows y - 2 ... y + 2
#pragma unroll
  for (int tap = 1; tap < kTaps; ++tap) {
    const int64_t row = begin - 1 + tap - kRadius;
    if (row >= 0 && row < s.h) ring[tap] = row_max<T, V, kRelu>(x + row * s.w * s.c, column, s);
  }
  for (int64_t y = begin; y < end; ++y) {
#pragma unroll
    for (int tap = 1; tap < kTaps; ++tap) ring[tap - 1] = ring[tap];
    const int64_t below = y + kRadius;
    if (below < s.h) ring[kTaps - 1] = row_max<T, V, kRelu>(x + below * s.w * s.c, column, s);
    const int first_tap = y < kRadius ? static_cast<int>(kRadius - y) : 0;
    const int last_tap = below < s.h ? kTaps - 1 : static_cast<int>(s.h - 1 - y) + kRadius;
    const int64_t out = image + (y * s.w + column) * s.c;
    write<T, V, kArgmax>(ring, first_tap, last_tap, static_cast<T*>(p.y) + out, kArgmax ? p.argmax + out : nullptr);
  }
}

// gx at (v, u) gathers in the order of the CPU's: for each column x whose dx in row v points at u, what (v, x) received
// through the column pass from those rows y whose dy points at v.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) backward_kernel(MaxPool5Backward p) {
  const Shape& s = p.shape;
  int64_t index = thread_index();
  if (index >= s.n * s.h * s.w * (s.c / V)) return;
  const int64_t channel = pop(&index, s.c / V) * V, u = pop(&index, s.w), v = pop(&index, s.h);
  const int64_t image = index * s.h * s.w * s.c + channel;
  const T* gy = static_cast<const T*>(p.gy) + image;
  const uint8_t* argmax = p.argmax + image;

  float sum[V] = {};
  for (int dx = 0; dx < kTaps; ++dx) {
    const int64_t x = u - dx + kRadius;
    if (x < 0 || x >= s.w) continue;
    const Pack<uint8_t, V> row_choice = load<uint8_t, V>(argmax + (v * s.w + x) * s.c);
    float received[V] = {};
    for (int dy = 0; dy < kTaps; ++dy) {
      const int64_t y = v - dy + kRadius;
      if (y < 0 || y >= s.h) continue;
      const int64_t at = (y * s.w + x) * s.c;
      const Pack<uint8_t, V> choice = load<uint8_t, V>(argmax + at);
      const Pack<T, V> g = load<T, V>(gy + at);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (choice.lane[i] >> 3 == dy) received[i] += widen(g.lane[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if ((row_choice.lane[i] & 7) == dx) sum[i] += received[i];
    }
  }
  const int64_t out = (v * s.w + u) * s.c;
  Pack<T, V> gx;
  if (p.add) gx = load<T, V>(static_cast<const T*>(p.add) + image + out);
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(p.add ? sum[i] + widen(gx.lane[i]) : sum[i], &gx.lane[i]);
  store<T, V>(static_cast<T*>(p.gx) + image + out, gx);
}

template <class T, int V>
int forward(const MaxPool5& p, int device, void* stream) {
  const Shape& s = p.shape;
  const int64_t count = s.n * ((s.h + kStrip - 1) / kStrip) * s.w * (s.c / V);
  const auto kernel = p.argmax ? (p.relu ? forward_kernel<T, V, true, true> : forward_kernel<T, V, false, true>)
                               : (p.relu ? forward_kernel<T, V, true, false> : forward_kernel<T, V, false, false>);
  return launch(kernel, p, count, device, stream);
}

template <class T>
struct Forward {
  static int run(const MaxPool5& p, int device, void* stream) {
    constexpr int kLanes = 16 / sizeof(T);
    return vector_lanes<T>(p.shape.c, {p.x, p.y, p.argmax}) == kLanes ? forward<T, kLanes>(p, device, stream)
                                                                      : forward<T, 1>(p, device, stream);
  }
};

template <class T>
struct Backward {
  static int run(const MaxPool5Backward& p, int device, void* stream) {
    constexpr int kLanes = 16 / sizeof(T);
    const Shape& s = p.shape;
    const int lanes = vector_lanes<T>(s.c, {p.gy, p.argmax, p.add, p.gx});
    const auto kernel = lanes == kLanes ? backward_kernel<T, kLanes> : backward_kernel<T, 1>;
    return launch(kernel, p, s.n * s.h * s.w * (s.c / lanes), device, stream);
  }
};

}  // namespace

int maxpool5(const MaxPool5& p, int device, void* stream) { return by_dtype<Forward>(p, device, stream); }

int maxpool5_backward(const MaxPool5Backward& p, int device, void* stream) {
  return by_dtype<Backward>(p, device, stream);
}

}  // namespace refinenet_fast::cuda
