// 3x3 and 1x1 convolutions, stride 1, zero padding, NHWC, as an implicit product of matrices by mma.sync:
//
//   y[p, k] = sum over channels c and taps t of x[p + t, c] w[t, k, c]
//
// A block of 2x2 warps computes kTile pixels x kTile output channels. Pixels follow each other in memory, across rows
// and images, so nothing is wasted on ragged sizes. It walks over the taps of one slice of channels after another: the
// nine shifted reads of a slice hit the caches. The input gradient is the same with turned weights.
//
// Where tiles are few, blocks split a tile's slices, and conv3x3_splits.cu adds what they have summed.
#include "cuda/kernels.h"
#include "cuda/plan_sm90.h"
#include "cuda/tile.h"

namespace refinenet_fast::cuda {
namespace {

// What one thread copies of every stage: the same chunk of kRows pixels, and of output channels.
template <class T, class Copy, int kTile>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Request& request, int32_t first_pixel, int32_t first_out, int32_t first_slice)
      : weights_(request.p, first_out), x_(static_cast<const T*>(request.p.x)), c_(request.p.shape.c) {
    const PackedConvolution& p = request.p;
    const int32_t pixels = pixels_of(p.shape);
    row_ = threadIdx.x / kSliceChunks;
    chunk_ = threadIdx.x % kSliceChunks;
    channel_ = (first_slice * kSliceChunks + chunk_) * kLanes;
    weights_.skip(first_slice);
    radius_ = p.side / 2;
    w_ = p.shape.w;
    piece_ = request.piece;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t pixel = first_pixel + row_ + i * kRowsAtOnce;
      const Pixel at = pixel_at(pixel < pixels ? pixel : 0, request.h, request.w);
      inside_[i] = pixel < pixels ? taps_inside(at, p.side, p.shape.h, p.shape.w) : 0;
    }
    own_ = x_ + int64_t{first_pixel + row_} * c_ + channel_;
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
      Copy::copy(stage + narrow_chunk(row_ + i * kRowsAtOnce, chunk_), from + int64_t{i * kRowsAtOnce} * c_,
                 inside ? lanes : 0, x_, piece_);
    }
    weights_(stage + kTile * kNarrowRow, tap_, lanes);
    advance();
  }

 private:
  static constexpr int kLanes = kChunkBytes / sizeof(T), kRows = kTile / kRowsAtOnce;

  __device__ __forceinline__ void advance() {
    ++tap_;
    if (++shift_.dx <= radius_) return;
    shift_.dx = -radius_;
    if (++shift_.dy <= radius_) return;
    shift_.dy = -radius_;
    tap_ = 0;
    channel_ += kSliceChunks * kLanes;
    own_ += kSliceChunks * kLanes;
    weights_.skip(1);
  }

  WeightLoader<T, kTile> weights_;
  const T *x_ /* [N, H, W, C] */, *own_ /* at this thread's first pixel and channel */;
  uint32_t inside_[kRows];  // bit t: tap t of the pixel reads inside the image
  int32_t c_, w_, radius_, channel_;
  int row_, chunk_, piece_, tap_ = 0;
  Tap shift_;  // of tap_
};

// Grid: tiles of output channels of one tile of pixels, then the next one's; then all again for the next split.
template <class Math, class In, class Copy, int kTile>
__global__ void __launch_bounds__(kProductThreads, kResident) conv_kernel(Request request) {
  using T = typename Math::Element;
  using Square = Tile<kTile, kTile>;
  extern __shared__ __align__(128) unsigned char shared[];
  const PackedConvolution& p = request.p;
  const int32_t across = blocks_of<int32_t>(p.k, kTile), tiles = gridDim.x / p.splits;
  const int32_t split = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int32_t first_pixel = tile / across * kTile, first_out = tile % across * kTile;
  const int32_t slices = blocks_of<int32_t>(p.shape.c, kNarrowRow / sizeof(T));
  const int32_t begin = split_begin(slices, split, p.splits), end = split_begin(slices, split + 1, p.splits);

  typename Square::Sums sum = {};
  Loader<T, Copy, kTile> loader(request, first_pixel, first_out, begin);
  through_ring<kStages>(
      ptx::shared_address(shared), 2 * kTile * kNarrowRow, (end - begin) * p.side * p.side,
      [&loader](uint32_t stage) { loader(stage); },
      [&sum](uint32_t stage) {
        const auto same = [](uint32_t pixel) { return pixel; };
        multiply_stage<Math, In, Square>(stage, stage + kTile * kNarrowRow, same, sum);
      });

  const auto place_of = [&](int row) -> Place {
    const int32_t pixel = first_pixel + row, pixels = pixels_of(p.shape);
    return {pixel_at(pixel, request.h, request.w), pixel, pixel < pixels};
  };
  finish<T, Square>(request, sum, shared, place_of, first_out, part_of(p, split));
}

using Kernel = void (*)(Request);

template <class Math, class In>
Kernel kernel_of(const Plan& plan) {
  // In pieces only small tiles: what does not come in whole chunks has few channels.
  if (plan.piece != kChunkBytes) return conv_kernel<Math, In, CopyPieces, kSmall>;
  return plan.tile == kLarge ? conv_kernel<Math, In, CopyChunks, kLarge> : conv_kernel<Math, In, CopyChunks, kSmall>;
}

template <class Math>
Kernel kernel_of(const PackedConvolution& p, const Plan& plan) {
  return p.relu_in ? kernel_of<Math, Rectified>(plan) : kernel_of<Math, Unchanged>(plan);
}

}  // namespace

int conv3x3(const PackedConvolution& asked, int device, void* stream) {
  if (asked.pool_in) return pool_conv3x3(asked, device, stream);
  if (!is_sound(asked) || (asked.splits > 1 && !asked.parts)) return cudaErrorInvalidValue;
  PackedConvolution p = asked;
  if (!p.parts) p.splits = 1;  // the caller, who makes room for them, has asked the plan
  int processors;
  if (const int error = multiprocessors(device, &processors)) return error;
#ifdef REFINENET_FAST_SM90A
  int on;
  if (const int error = capability(device, &on)) return error;
  if (sm90::takes(p, on)) return sm90::conv3x3(p, processors, device, stream);
#endif
  const Plan chosen = plan(p, processors);
  p.splits = chosen.splits;
  const Kernel kernel = by_arithmetic(p, [&](auto math) { return kernel_of<decltype(math)>(p, chosen); });
  const Request request{p, divider(p.shape.h), divider(p.shape.w), whole_out(p), chosen.piece};
  const int error = launch_blocks(kernel, request, chosen.blocks, kProductThreads, chosen.shared_bytes, device, stream);
  return error || p.splits == 1 ? error : sum_splits(p, device, stream);
}

}  // namespace refinenet_fast::cuda
