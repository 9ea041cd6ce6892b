// 3x3 and 1x1 convolutions, stride 1, zero padding, NHWC, as an implicit product of matrices by mma.sync:
//
//   y[p, k] = sum over channels c and taps t of x[p + t, c] w[t, k, c]
//
// A block of 2x2 warps computes kTile pixels x kTile output channels. Pixels follow each other in memory, across rows
// and images, so nothing is wasted on ragged sizes. It walks over the taps of one slice of channels after another: the
// nine shifted reads of a slice hit the caches. The input gradient is the same with turned weights.
#include "cuda/arithmetic.h"
#include "cuda/kernels.h"
#include "cuda/ring.h"
#include "cuda/way_out.h"

namespace refinenet_fast::cuda {
namespace {

// The kernel's own copy of what is derived from the request.
struct Request {
  PackedConvolution p;
  Divider h, w;
  bool whole_out;  // whether the maps of the way out are whole chunks at multiples of 16 bytes
};

// What one thread copies of every stage: the same chunk of kRows pixels and of kRows output channels.
template <class T, class Copy, int kTile>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Request& request, int32_t first_pixel, int32_t first_out)
      : x_(static_cast<const T*>(request.p.x)), c_(request.p.shape.c), row_(threadIdx.x / kChunks) {
    const PackedConvolution& p = request.p;
    const int32_t pixels = pixels_of(p.shape), chunk = threadIdx.x % kChunks;
    channel_ = chunk * kLanes;
    chunk_ = chunk;
    side_ = p.side;
    radius_ = p.side / 2;
    w_ = p.shape.w;
    pitch_ = blocks_of(c_, kLanes) * kLanes;
    const int64_t last_tap = (side_ * side_ - 1) * p.k * pitch_;
    tap_stride_ = p.turned ? -p.k * pitch_ : p.k * pitch_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t pixel = first_pixel + row_ + i * kStride;
      const Pixel at = pixel_at(pixel < pixels ? pixel : 0, request.h, request.w);
      inside_[i] = pixel < pixels ? taps_inside(at, side_, p.shape.h, p.shape.w) : 0;
    }
    own_ = x_ + int64_t{first_pixel + row_} * c_ + channel_;
    outs_left_ = static_cast<int32_t>(p.k) - first_out - row_;
    weights_ = static_cast<const T*>(p.weights);
    weight_ = weights_ + int64_t{first_out + row_} * pitch_ + channel_ + (p.turned ? last_tap : 0);
    shift_ = {-radius_, -radius_};
  }

  // Starts the copies of one tap of one slice of channels into a stage, and goes on to the next.
  __device__ __forceinline__ void operator()(uint32_t stage) {
    const int lanes = lanes_left(channel_, c_, kLanes);
    const int32_t shift = shift_.dy * w_ + shift_.dx;
    const T* from = own_ + int64_t{shift} * c_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool inside = inside_[i] >> tap_ & 1;
      Copy::copy(stage + narrow_chunk(row_ + i * kStride, chunk_), from + int64_t{i * kStride} * c_, inside ? lanes : 0,
                 x_);
    }
    const T* weight = weight_ + tap_ * tap_stride_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool given = i * kStride < outs_left_;
      // Packed weights are whole chunks, whatever the pixels are.
      CopyChunks::copy(stage + kOperandBytes + narrow_chunk(row_ + i * kStride, chunk_),
                       weight + i * kStride * int64_t{pitch_}, given ? lanes : 0, weights_);
    }
    advance();
  }

  static constexpr uint32_t kOperandBytes = kTile * kNarrowRow;

 private:
  static constexpr int kLanes = kChunkBytes / sizeof(T), kChunks = kNarrowRow / kChunkBytes;
  static constexpr int kStride = kProductThreads / kChunks, kRows = kTile / kStride;

  __device__ __forceinline__ void advance() {
    ++tap_;
    if (++shift_.dx <= radius_) return;
    shift_.dx = -radius_;
    if (++shift_.dy <= radius_) return;
    shift_.dy = -radius_;
    tap_ = 0;
    channel_ += kChunks * kLanes;
    own_ += kChunks * kLanes;
    weight_ += kChunks * kLanes;
  }

  const T *x_ /* [N, H, W, C] */, *own_ /* at this thread's first pixel and channel */;
  const T *weights_ /* [TAPS, K, PITCH] */, *weight_ /* at this thread's first output and channel */;
  int64_t tap_stride_;      // from tap to tap; of turned weights negative
  uint32_t inside_[kRows];  // bit t: tap t of the pixel reads inside the image
  int32_t c_, pitch_, w_, side_, radius_, channel_, outs_left_;
  int row_, chunk_, tap_ = 0;
  Tap shift_;  // of tap_
};

// sum += the products of one stage, for a warp's quarter of the tile.
template <class Math, class In, int kTile>
__device__ __forceinline__ void multiply_stage(uint32_t stage, float (&sum)[kTile / 32][kTile / 16][4]) {
  constexpr int kRows = kTile / 32, kColumns = kTile / 16;
  const uint32_t weights = stage + kTile * kNarrowRow, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t pixel = warp / 2 * (kTile / 2), out = warp % 2 * (kTile / 2);
#pragma unroll
  for (int chunk = 0; chunk < kNarrowRow / kChunkBytes; chunk += 2) {
    uint32_t a[kRows][4], b[kColumns / 2][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      // Matrices in the order of operand A: upper rows, lower rows, then both again one chunk on.
      ptx::ldmatrix_x4(a[m], stage + narrow_chunk(pixel + m * 16 + lane % 16, chunk + lane / 16));
      In::template apply<Math>(a[m]);
    }
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      // Two operands B: eight output channels at both chunks, then the next eight.
      const uint32_t row = out + n * 16 + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_x4(b[n], weights + narrow_chunk(row, chunk + lane / 8 % 2));
    }
    multiply_all<Math>(a, b, sum);
  }
}

// The warps' sums as one tile [kTile, pitch_of(kTile)] in shared memory.
template <int kTile>
__device__ __forceinline__ void spread(const float (&sum)[kTile / 32][kTile / 16][4], float* tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 2 * (kTile / 2) + lane / 4, column = warp % 2 * (kTile / 2) + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < kTile / 32; ++m) {
#pragma unroll
    for (int n = 0; n < kTile / 16; ++n) {
      float* pair = tile + (row + m * 16) * pitch_of(kTile) + column + n * 8;
      *reinterpret_cast<float2*>(pair) = make_float2(sum[m][n][0], sum[m][n][1]);
      *reinterpret_cast<float2*>(pair + 8 * pitch_of(kTile)) = make_float2(sum[m][n][2], sum[m][n][3]);
    }
  }
}

// The way out of a tile, V neighbouring output channels at a time.
template <class T, int V, int kTile>
__device__ __forceinline__ void write(const Request& request, const float* tile, int32_t first_pixel,
                                      int32_t first_out) {
  const PackedConvolution& p = request.p;
  const int32_t pixels = pixels_of(p.shape), k = p.k;
  for (int item = threadIdx.x; item < kTile * kTile / V; item += kProductThreads) {
    const int row = item / (kTile / V), column = item % (kTile / V) * V;
    const int32_t pixel = first_pixel + row, channel = first_out + column;
    if (pixel >= pixels || channel >= k) continue;
    float value[V];
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = tile[row * pitch_of(kTile) + column + i];
    Spot<T, V> spot{value, pixel_at(pixel, request.h, request.w), int64_t{pixel} * k + channel, channel, k};
    AllSteps::apply(p.out, spot);
  }
}

// Grid: tiles of output channels of one tile of pixels, then the next one's.
template <class Math, class In, class Copy, int kTile>
__global__ void __launch_bounds__(kProductThreads, kResident) conv_kernel(Request request) {
  using T = typename Math::Element;
  extern __shared__ __align__(128) unsigned char shared[];
  const PackedConvolution& p = request.p;
  const int32_t across = blocks_of<int32_t>(p.k, kTile);
  const int32_t first_pixel = static_cast<int32_t>(blockIdx.x) / across * kTile;
  const int32_t first_out = static_cast<int32_t>(blockIdx.x) % across * kTile;

  float sum[kTile / 32][kTile / 16][4] = {};
  Loader<T, Copy, kTile> loader(request, first_pixel, first_out);
  const int32_t slices = blocks_of<int32_t>(p.shape.c, kNarrowRow / sizeof(T));
  through_ring(
      ptx::shared_address(shared), 2 * kTile * kNarrowRow, slices * p.side * p.side,
      [&loader](uint32_t stage) { loader(stage); },
      [&sum](uint32_t stage) { multiply_stage<Math, In, kTile>(stage, sum); });

  // Through shared memory, so that global memory sees whole rows instead of pairs.
  float* tile = reinterpret_cast<float*>(shared);
  spread<kTile>(sum, tile);
  __syncthreads();  // rows are read by other warps than wrote them
  if (request.whole_out) {
    write<T, kChunkBytes / sizeof(T), kTile>(request, tile, first_pixel, first_out);
  } else {
    write<T, 1, kTile>(request, tile, first_pixel, first_out);
  }
}

using Kernel = void (*)(Request);

template <class Math, class In>
Kernel kernel_of(const Plan& plan) {
  // Element by element only small tiles: what does not come in whole chunks has few channels.
  if (!plan.whole_chunks) return conv_kernel<Math, In, CopyElements, kSmall>;
  return plan.tile == kLarge ? conv_kernel<Math, In, CopyChunks, kLarge> : conv_kernel<Math, In, CopyChunks, kSmall>;
}

template <class Math>
Kernel kernel_of(const PackedConvolution& p, const Plan& plan) {
  return p.relu_in ? kernel_of<Math, Rectified>(plan) : kernel_of<Math, Unchanged>(plan);
}

}  // namespace

int conv3x3(const PackedConvolution& p, int device, void* stream) {
  if (refusal(p.shape, p.k)) return cudaErrorInvalidValue;
  int processors;
  if (const int error = multiprocessors(device, &processors)) return error;
  const Plan chosen = plan(p, processors);
  const Kernel kernel = by_arithmetic(p, [&](auto math) { return kernel_of<decltype(math)>(p, chosen); });
  const Request request{p, divider(p.shape.h), divider(p.shape.w), whole_out(p)};
  return launch_blocks(kernel, request, chosen.blocks, kProductThreads, chosen.shared_bytes, device, stream);
}

}  // namespace refinenet_fast::cuda
