// 5x5 max pool, after ReLU or not, and 3x3 or 1x1 convolution of its result in one pass over memory, by mma.sync: a
// link of the chained residual pooling. The pooled map is never written.
//
// A block copies the pixels around its 8 x 8 ones, one slice of channels after another, replaces them by their maxima
// where they lie, along rows, then along columns, and multiplies by all taps of the slice.
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/pooled_tile.h"
#include "cuda/tile.h"

namespace refinenet_fast::cuda {
namespace {

// What one thread copies: of every stage a chunk of the weights' rows, of every slice of channels one of kRows pixels.
template <class T, int kSide, int kOuts>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Request& request, const Pixel& first, int32_t first_out, uint32_t buffers)
      : request_(request), first_(first), weights_(request.p, first_out), buffers_(buffers) {
    chunk_ = threadIdx.x % kSliceChunks;
    channel_ = chunk_ * kLanes;
  }

  // Starts the copies of one tap of one slice, with the first one those of its pixels, and goes on to the next.
  __device__ __forceinline__ void operator()(uint32_t stage) {
    const int lanes = lanes_left(channel_, static_cast<int32_t>(request_.p.shape.c), kLanes);
    weights_(stage, tap_, lanes);
    if (tap_ == 0) {
      if (request_.piece == kChunkBytes) {
        pixels<CopyChunks>(lanes);
      } else {
        pixels<CopyPieces>(lanes);
      }
    }
    if (++tap_ < kSide * kSide) return;
    tap_ = 0;
    channel_ += kSliceChunks * kLanes;
    weights_.skip(1);
    if (++slice_ == Geometry::kSlices) slice_ = 0;
  }

 private:
  using Geometry = PooledTile<kSide>;
  static constexpr int kLanes = kChunkBytes / sizeof(T), kPixels = Geometry::kRaw * Geometry::kRaw;
  static constexpr int kRows = blocks_of(kPixels, kRowsAtOnce);

  // Where they lie is computed anew for each slice: there are no registers to keep it in.
  template <class Copy>
  __device__ __forceinline__ void pixels(int lanes) const {
    const int32_t h = request_.p.shape.h, w = request_.p.shape.w;
    const uint32_t buffer = buffers_ + slice_ * Geometry::kBytes;
    const T* x = static_cast<const T*>(request_.p.x);  // [N, H, W, C]
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t number = threadIdx.x / kSliceChunks + i * kRowsAtOnce;
      if ((i + 1) * kRowsAtOnce > kPixels && number >= kPixels) continue;
      const int32_t row = number / Geometry::kRaw, column = number % Geometry::kRaw;
      const T* from = x + raw_pixel<kSide>(first_, row, column, h, w) * request_.p.shape.c + channel_;
      Copy::copy(buffer + narrow_chunk(slot_of<kSide>(row, column), chunk_), from, lanes, x, request_.piece);
    }
  }

  const Request& request_;
  const Pixel& first_;
  WeightLoader<T, kOuts> weights_;
  uint32_t buffers_;
  int32_t channel_;
  int chunk_, tap_ = 0, slice_ = 0;
};

// Maxima over windows of five of kCount slots, in place: the first kCount - 4 get them, as `finish` makes them of their
// number and value. at(i): where eight bytes of slot i lie.
template <class Math, int kCount, class At, class Finish>
__device__ __forceinline__ void pool_line(const At& at, const Finish& finish) {
  static_assert(kPoolRadius == 2, "windows of five");
  const auto maximum = [](const uint2& a, const uint2& b) -> uint2 {
    return {Math::maximum(a.x, b.x), Math::maximum(a.y, b.y)};
  };
  uint2 one[kCount], two[kCount];  // two: of a slot and the next
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    one[i] = ptx::load_8(at(i));
    if (i > 0) two[i - 1] = maximum(one[i - 1], one[i]);
  }
#pragma unroll
  for (int i = 0; i + 4 < kCount; ++i) {
    ptx::store_8(at(i), finish(i, maximum(maximum(two[i], two[i + 2]), one[i + 4])));
  }
}

// The pixels of one slice of channels become pooled ones, and 0 outside of the image. A thread has eight bytes of one
// row, then of one column.
template <class Math, int kSide>
__device__ __forceinline__ void pool(const PackedConvolution& p, const Pixel& first, uint32_t buffer) {
  using Geometry = PooledTile<kSide>;
  constexpr uint32_t kPairs = kNarrowRow / 8;
  static_assert(kProductThreads / kPairs >= Geometry::kRaw, "one line a thread");
  const uint32_t pair = threadIdx.x % kPairs, line = threadIdx.x / kPairs;
  const auto place = [=](uint32_t slot) { return buffer + narrow_chunk(slot, pair / 2) + pair % 2 * 8; };
  if (line < Geometry::kRaw) {
    pool_line<Math, Geometry::kRaw>([=](int i) { return place(slot_of<kSide>(line, i)); },
                                    [](int, const uint2& value) { return value; });
  }
  __syncthreads();  // rows have become maxima
  const uint32_t least = p.relu_in ? 0 : Math::kLowest;
  if (line < Geometry::kPooled) {
    pool_line<Math, Geometry::kRaw>([=](int i) { return place(slot_of<kSide>(i, line)); },
                                    [&](int i, const uint2& value) -> uint2 {
                                      const bool real =
                                          kSide == 1 || is_pooled<kSide>(first, i, line, p.shape.h, p.shape.w);
                                      if (!real) return {0, 0};
                                      return {Math::maximum(value.x, least), Math::maximum(value.y, least)};
                                    });
  }
  __syncthreads();  // columns have
}

// Grid: tiles of output channels of one tile of pixels, then the next one's.
template <class Math, int kSide, int kOuts>
__global__ void __launch_bounds__(kProductThreads, kResident) pool_kernel(Request request) {
  using T = typename Math::Element;
  using Block = Tile<kTilePixels, kOuts>;
  using Geometry = PooledTile<kSide>;
  extern __shared__ __align__(128) unsigned char shared[];
  const PackedConvolution& p = request.p;
  const int32_t across = blocks_of<int32_t>(p.k, kOuts);
  const Pixel first = tile_at(static_cast<int32_t>(blockIdx.x) / across, request.h, request.w);
  const int32_t first_out = static_cast<int32_t>(blockIdx.x) % across * kOuts;

  typename Block::Sums sum = {};
  const uint32_t ring = ptx::shared_address(shared), buffers = ring + kPoolStages * kOuts * kNarrowRow;
  Loader<T, kSide, kOuts> loader(request, first, first_out, buffers);
  const int32_t slices = blocks_of<int32_t>(p.shape.c, kNarrowRow / sizeof(T));
  uint32_t tap = 0, slice = 0;
  through_ring<kPoolStages>(
      ring, kOuts * kNarrowRow, slices * kSide * kSide, [&loader](uint32_t stage) { loader(stage); },
      [&](uint32_t stage) {
        const uint32_t buffer = buffers + slice % Geometry::kSlices * Geometry::kBytes;
        if (tap == 0) pool<Math, kSide>(p, first, buffer);
        const auto slot = [tap](uint32_t pixel) { return slot_of_tap<kSide>(pixel, tap); };
        multiply_stage<Math, Unchanged, Block>(buffer, stage, slot, sum);
        if (++tap < kSide * kSide) return;
        tap = 0;
        ++slice;
      });

  const auto place_of = [&](int pixel) -> Place {
    const Pixel at{first.image, first.row + pixel / kTileEdge, first.column + pixel % kTileEdge};
    const int32_t number = number_of(at, p.shape.h, p.shape.w);
    return {at, number, number >= 0};
  };
  finish<T, Block>(request, sum, shared, place_of, first_out);
}

using Kernel = void (*)(Request);

template <class Math>
Kernel kernel_of(int side, int outs) {
  if constexpr (!std::is_same_v<Math, Tf32x3>) {
    if (outs == kWide) return side == 1 ? pool_kernel<Math, 1, kWide> : pool_kernel<Math, 3, kWide>;
  }
  return side == 1 ? pool_kernel<Math, 1, kSmall> : pool_kernel<Math, 3, kSmall>;
}

}  // namespace

int pool_conv3x3(const PackedConvolution& p, int device, void* stream) {
  if (!is_sound(p, true)) return cudaErrorInvalidValue;
  int processors;
  if (const int error = multiprocessors(device, &processors)) return error;
  const Plan chosen = plan(p, processors);
  const Kernel kernel = by_arithmetic(p, [&](auto math) { return kernel_of<decltype(math)>(p.side, chosen.tile); });
  const Divider down = divider(blocks_of<int64_t>(p.shape.h, kTileEdge));
  const Divider across = divider(blocks_of<int64_t>(p.shape.w, kTileEdge));
  const Request request{p, down, across, whole_out(p), chosen.piece};
  return launch_blocks(kernel, request, chosen.blocks, kProductThreads, chosen.shared_bytes, device, stream);
}

}  // namespace refinenet_fast::cuda
