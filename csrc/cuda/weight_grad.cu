// Gradient of a 3x3 (or 1x1) convolution in its weight, as a product of matrices over the pixels, by mma.sync:
//
//   g[k, t, c] = sum over pixels p of gy[p, k] x[p + t, c]
//
// A block computes kTile output channels x kTile input channels of one tap over one split of the pixels; then the
// splits are summed from the first to the last. The order is always the same, and there are no atomics.
//
// The bias's gradient, the sum of gy, is a product by ones. All blocks of one split that read the same channels of gy,
// one for each tap and tile of input channels, take turns with it from stage to stage: so all take equally long.
#include <type_traits>

#include "cuda/arithmetic.h"
#include "cuda/kernels.h"
#include "cuda/ring.h"

namespace refinenet_fast::cuda {
namespace {

// The kernel's own copy of what is derived from the request.
struct Request {
  PackedWeightGrad p;
  Divider h, w;
  int32_t splits, shares, piece;  // as in the plan
};

// Of the weight.
__device__ __forceinline__ int64_t elements_of(const PackedWeightGrad& p) { return p.k * p.side * p.side * p.shape.c; }

// A block's part of the work.
struct Part {
  int32_t first_out, first_channel, split;
  int32_t number;  // of the tap
  int32_t share;   // of the bias's gradient
};

// Grid: tiles of input channels, taps, tiles of output channels, splits; the first is the fastest.
template <int kTile>
__device__ __forceinline__ Part part_of(const PackedWeightGrad& p, int32_t block) {
  const int32_t across = blocks_of<int32_t>(p.shape.c, kTile), down = blocks_of<int32_t>(p.k, kTile);
  const int32_t taps = p.side * p.side, rest = block / across / taps;
  return {rest % down * kTile, block % across * kTile, rest / down, block / across % taps, block % (across * taps)};
}

// Rows of a stage: one pixel each, of the gradient's channels first, then of the input's.
template <class T, int kTile>
struct Stage {
  static constexpr int kRow = kTile * sizeof(T), kPixels = kNarrowRow / sizeof(T);
  static constexpr uint32_t kOperand = kRow * kPixels;
};

// What one thread copies of every stage: one chunk of kRows pixels, of both operands.
template <class T, class Copy, int kTile>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Request& request, const Part& part, int32_t first_pixel)
      : request_(request), tap_(tap_at(part.number, request.p.side)), pixel_(first_pixel + threadIdx.x / kChunks) {
    chunk_ = threadIdx.x % kChunks;
    out_ = part.first_out + chunk_ * kLanes;
    channel_ = part.first_channel + chunk_ * kLanes;
  }

  // Starts the copies of a stage's pixels, and goes on to the next ones'.
  __device__ __forceinline__ void operator()(uint32_t stage) {
    const PackedWeightGrad& p = request_.p;
    const int32_t h = p.shape.h, w = p.shape.w, c = p.shape.c, k = p.k, pixels = pixels_of(p.shape);
    const T *x = static_cast<const T*>(p.x), *gy = static_cast<const T*>(p.gy);
    const int outs = lanes_left(out_, k, kLanes), channels = lanes_left(channel_, c, kLanes);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t pixel = pixel_ + i * kStride, row = threadIdx.x / kChunks + i * kStride;
      const bool there = pixel < pixels;
      const bool inside = there && reads_inside(pixel_at(pixel, request_.h, request_.w), tap_, h, w);
      const int64_t read = int64_t{pixel} + tap_.dy * w + tap_.dx;
      const uint32_t to = stage + wide_chunk<kRow>(row, chunk_);
      Copy::copy(to, gy + int64_t{pixel} * k + out_, there ? outs : 0, gy, request_.piece);
      Copy::copy(to + Stage<T, kTile>::kOperand, x + read * c + channel_, inside ? channels : 0, x, request_.piece);
    }
    pixel_ += Stage<T, kTile>::kPixels;
  }

 private:
  static constexpr int kRow = Stage<T, kTile>::kRow, kLanes = kChunkBytes / sizeof(T), kChunks = kRow / kChunkBytes;
  static constexpr int kStride = kProductThreads / kChunks, kRows = Stage<T, kTile>::kPixels / kStride;

  const Request& request_;
  Tap tap_;
  int32_t pixel_, out_, channel_;
  int chunk_;
};

// ---- Fragments of operands that lie in memory the other way round: pixels are the inner dimension of the product
// --------

// For 16-bit elements: ldmatrix transposes.
template <class T, int kRow>
struct Transposed {
  static constexpr int kPixels = 16;  // of one product

  // Operand A: 16 output channels from chunk `chunk` on; upper rows, lower rows, then both again eight pixels on.
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t operand, uint32_t pixel, uint32_t channel) {
    const uint32_t lane = threadIdx.x % 32, chunk = channel / 8;
    ptx::ldmatrix_x4_trans(a, operand + wide_chunk<kRow>(pixel + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
  }
  // Two operands B: eight input channels at both halves of the pixels, then the next eight.
  static __device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t operand, uint32_t pixel, uint32_t channel) {
    const uint32_t lane = threadIdx.x % 32, chunk = channel / 8;
    ptx::ldmatrix_x4_trans(b, operand + wide_chunk<kRow>(pixel + lane / 8 % 2 * 8 + lane % 8, chunk + lane / 16));
  }
};

// For float32, which ldmatrix does not transpose: each lane loads the words that it holds.
template <int kRow>
struct Transposed<float, kRow> {
  static constexpr int kPixels = 8;

  static __device__ __forceinline__ uint32_t word(uint32_t operand, uint32_t pixel, uint32_t channel) {
    return ptx::load_word(operand + wide_chunk<kRow>(pixel, channel / 4) + channel % 4 * 4);
  }
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t operand, uint32_t pixel, uint32_t channel) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = word(operand, pixel + lane % 4 + i / 2 * 4, channel + lane / 4 + i % 2 * 8);
  }
  static __device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t operand, uint32_t pixel, uint32_t channel) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = word(operand, pixel + lane % 4 + i % 2 * 4, channel + lane / 4 + i / 2 * 8);
  }
};

// sum += the products of one stage, for a warp's quarter of the tile.
template <class Math, class In, int kTile>
__device__ __forceinline__ void multiply_stage(uint32_t stage, float (&sum)[kTile / 32][kTile / 16][4]) {
  using T = typename Math::Element;
  using Load = Transposed<T, Stage<T, kTile>::kRow>;
  constexpr int kRows = kTile / 32, kColumns = kTile / 16;
  const uint32_t input = stage + Stage<T, kTile>::kOperand, warp = threadIdx.x / 32;
  const uint32_t out = warp / 2 * (kTile / 2), channel = warp % 2 * (kTile / 2);
#pragma unroll
  for (int pixel = 0; pixel < Stage<T, kTile>::kPixels; pixel += Load::kPixels) {
    uint32_t a[kRows][4], b[kColumns / 2][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) Load::load_a(a[m], stage, pixel, out + m * 16);
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      Load::load_b(b[n], input, pixel, channel + n * 16);
      In::template apply<Math>(b[n]);
    }
    multiply_all<Math>(a, b, sum);
  }
}

// The first of the output channels that a warp sums for the bias: a quarter of the tile's.
template <int kTile>
__device__ __forceinline__ uint32_t bias_channel() {
  return threadIdx.x / 32 * (kTile / 4);
}

// sum += the gradients of one stage, in each of eight columns.
template <class Math, int kTile>
__device__ __forceinline__ void add_stage(uint32_t stage, float (&sum)[kTile / 64][4]) {
  using T = typename Math::Element;
  using Load = Transposed<T, Stage<T, kTile>::kRow>;
#pragma unroll
  for (int pixel = 0; pixel < Stage<T, kTile>::kPixels; pixel += Load::kPixels) {
#pragma unroll
    for (int m = 0; m < kTile / 64; ++m) {
      uint32_t a[4];
      Load::load_a(a, stage, pixel, bias_channel<kTile>() + m * 16);
      Math::add_rows(sum[m], a);
    }
  }
}

// A block's sums into its split of [SPLITS, K, TAPS, C].
template <int kTile>
__device__ __forceinline__ void write(const PackedWeightGrad& p, const Part& part,
                                      const float (&sum)[kTile / 32][kTile / 16][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, taps = p.side * p.side;
  const int32_t c = p.shape.c, k = p.k;
  const int32_t first_out = part.first_out + warp / 2 * (kTile / 2) + lane / 4;
  const int32_t first_channel = part.first_channel + warp % 2 * (kTile / 2) + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < kTile / 32 * 2; ++m) {  // rows of eight output channels
    const int32_t out = first_out + m * 8;
    float* row = p.parts + ((int64_t{part.split} * k + out) * taps + part.number) * c;
#pragma unroll
    for (int n = 0; n < kTile / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t channel = first_channel + n * 8 + i;
        if (out < k && channel < c) row[channel] = sum[m / 2][n][m % 2 * 2 + i];
      }
    }
  }
}

// And those of its share of the bias into [SPLITS, SHARES, K] behind them.
template <int kTile>
__device__ __forceinline__ void write_bias(const Request& request, const Part& part,
                                           const float (&sum)[kTile / 64][4]) {
  const PackedWeightGrad& p = request.p;
  const int lane = threadIdx.x % 32;
  if (!p.gb || lane % 4) return;  // other lanes have the same sums
  const int32_t k = p.k, first_out = part.first_out + bias_channel<kTile>() + lane / 4;
  float* row = p.parts + request.splits * elements_of(p) + (int64_t{part.split} * request.shares + part.share) * k;
#pragma unroll
  for (int m = 0; m < kTile / 64 * 2; ++m) {
    const int32_t out = first_out + m * 8;
    if (out < k) row[out] = sum[m / 2][m % 2 * 2];
  }
}

template <class Math, class In, class Copy, int kTile>
__global__ void __launch_bounds__(kProductThreads, kResident) grad_kernel(Request request) {
  using T = typename Math::Element;
  extern __shared__ __align__(128) unsigned char shared[];
  const PackedWeightGrad& p = request.p;
  const Part part = part_of<kTile>(p, blockIdx.x);
  constexpr int kPixels = Stage<T, kTile>::kPixels;
  const int32_t stages = blocks_of<int32_t>(pixels_of(p.shape), kPixels);
  const int32_t begin = split_begin(stages, part.split, request.splits);
  const int32_t end = split_begin(stages, part.split + 1, request.splits);

  float sum[kTile / 32][kTile / 16][4] = {}, bias[kTile / 64][4] = {};
  int32_t until_bias = p.gb ? part.share : -1;  // stages
  Loader<T, Copy, kTile> loader(request, part, begin * kPixels);
  through_ring<kStages>(
      ptx::shared_address(shared), 2 * Stage<T, kTile>::kOperand, end - begin,
      [&loader](uint32_t stage) { loader(stage); },
      [&](uint32_t stage) {
        if (until_bias-- == 0) {
          add_stage<Math, kTile>(stage, bias);
          until_bias = request.shares - 1;
        }
        multiply_stage<Math, In, kTile>(stage, sum);
      });
  write<kTile>(p, part, sum);
  write_bias<kTile>(request, part, bias);
}

// The sum of `count` numbers, `stride` apart, in their order.
__device__ __forceinline__ float sum_of(const float* first, int32_t count, int64_t stride) {
  float sum = 0.0f;
  for (int32_t i = 0; i < count; ++i) sum += first[i * stride];
  return sum;
}

// One thread an element of the weight, then of the bias.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(Request request) {
  const PackedWeightGrad& p = request.p;
  const int64_t elements = elements_of(p), element = thread_index(), out = element - elements;
  if (element < elements) {
    int64_t index = element;
    const int64_t channel = pop(&index, p.shape.c), tap = pop(&index, p.side * p.side);
    const float sum = sum_of(p.parts + element, request.splits, elements);
    narrow(sum, static_cast<T*>(p.gw) + index * p.strides[0] + channel * p.strides[1] + tap * p.strides[2]);
  } else if (p.gb && out < p.k) {
    p.gb[out] = sum_of(p.parts + request.splits * elements + out, request.splits * request.shares, p.k);
  }
}

using Kernel = void (*)(Request);

template <class Math, class In>
Kernel kernel_of(const Plan& plan) {
  if (plan.piece != kChunkBytes) return grad_kernel<Math, In, CopyPieces, kSmall>;
  if constexpr (!std::is_same_v<Math, Tf32x3>) {
    if (plan.tile == kLarge) return grad_kernel<Math, In, CopyChunks, kLarge>;
  }
  return grad_kernel<Math, In, CopyChunks, kSmall>;
}

template <class Math>
Kernel kernel_of(const PackedWeightGrad& p, const Plan& plan) {
  return p.relu_in ? kernel_of<Math, Rectified>(plan) : kernel_of<Math, Unchanged>(plan);
}

Kernel sum_kernel_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return sum_kernel<__nv_bfloat16>;
    case DType::kFloat16:
      return sum_kernel<__half>;
    case DType::kFloat32:
      return sum_kernel<float>;
  }
  return nullptr;
}

}  // namespace

int weight_grad(const PackedWeightGrad& p, int device, void* stream) {
  if (!is_sound(p) || !p.parts) return cudaErrorInvalidValue;
  const Plan chosen = plan(p, 0);  // the splits are the caller's, who has room for that many
  const Kernel product = by_arithmetic(p, [&](auto math) { return kernel_of<decltype(math)>(p, chosen); });
  const Request request{p, divider(p.shape.h), divider(p.shape.w), chosen.splits, chosen.shares, chosen.piece};
  const int error =
      launch_blocks(product, request, chosen.blocks, kProductThreads, chosen.shared_bytes, device, stream);
  if (error) return error;
  const int64_t sums = p.k * p.side * p.side * p.shape.c + (p.gb ? p.k : 0);
  return launch(sum_kernel_of(p.gw_dtype), request, sums, device, stream);
}

}  // namespace refinenet_fast::cuda
