// What is left of a convolution whose input channels are split, where tiles are fewer than multiprocessors: each
// split's blocks, of either main loop, have written float32 sums; here they are added, from the first split to the
// last, and go the way out. The order is always the same, and there are no atomics.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/way_out.h"

namespace refinenet_fast::cuda {
namespace {

struct Request {
  PackedConvolution p;
  Divider vectors, h, w;  // vectors: of a pixel's output channels
};

// One thread V output channels of a pixel.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) splits_kernel(Request request) {
  const PackedConvolution& p = request.p;
  // Less than 2^31: the plan splits nothing larger.
  const int32_t item = static_cast<int32_t>(thread_index()), pixel = item / request.vectors;
  const int64_t pixels = pixels_of(p.shape);
  if (pixel >= pixels) return;
  const int32_t k = p.k, channel = (item - pixel * static_cast<int32_t>(request.vectors.by)) * V;
  constexpr int kAtOnce = V < 4 ? V : 4;
  const float* part = p.parts + int64_t{pixel} * k + channel;
  float value[V] = {};
  for (int32_t split = 0; split < p.splits; ++split, part += pixels * k) {
#pragma unroll
    for (int i = 0; i < V; i += kAtOnce) {
      const Pack<float, kAtOnce> sums = load<float, kAtOnce>(part + i);
#pragma unroll
      for (int lane = 0; lane < kAtOnce; ++lane) value[i + lane] += sums.lane[lane];
    }
  }
  Spot<T, V> spot{value, pixel_at(pixel, request.h, request.w), int64_t{pixel} * k + channel, channel, k};
  AllSteps::apply(p.out, spot);
}

template <class T>
struct Sum {
  static int run(const PackedConvolution& p, int device, void* stream) {
    constexpr int kLanes = kChunkBytes / sizeof(T);
    const int64_t pixels = pixels_of(p.shape), lanes = whole_out(p) ? kLanes : 1, vectors = p.k / lanes;
    const Request request{p, divider(vectors), divider(p.shape.h), divider(p.shape.w)};
    const auto kernel = lanes == 1 ? splits_kernel<T, 1> : splits_kernel<T, kLanes>;
    return launch(kernel, request, pixels * vectors, device, stream);
  }
};

}  // namespace

int sum_splits(const PackedConvolution& p, int device, void* stream) { return by_dtype<Sum>(p, device, stream); }

}  // namespace refinenet_fast::cuda
