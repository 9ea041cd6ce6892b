// How the sums of wgmma leave, a warp at a time: 16 pixels, 2 rows of 8, of all output channels of a tile, by slices of
// 32 channels through the warp's own part of shared memory, so that no warp waits for another one.
#pragma once

#include "cuda/plan_sm90.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/shared_memory.h"
#include "cuda/ptx/tensor_copy.h"
#include "cuda/way_out.h"

namespace refinenet_fast::cuda::sm90 {

// What one warp's way out works on.
struct WarpTile {
  const PackedConvolution& p;
  Pixel first;  // of its pixels
  int32_t out;  // the first output channel
  float* part;  // [N, H, W, K] of one split, or null
};

// ---- Any way out: threads take whole chunks of a pixel --------------------------------------------------------------

// Sums of 32 output channels as [16, pitch_of(32)] in shared memory.
__device__ __forceinline__ void spread(const float* sum, float* slice) {
  const int lane = threadIdx.x % 32;
  float* pair = slice + lane / 4 * pitch_of(kOutSlice) + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kOutSlice / 8; ++n) {
    *reinterpret_cast<float2*>(pair + n * 8) = make_float2(sum[n * 4], sum[n * 4 + 1]);
    *reinterpret_cast<float2*>(pair + n * 8 + 8 * pitch_of(kOutSlice)) = make_float2(sum[n * 4 + 2], sum[n * 4 + 3]);
  }
}

// The way out of those 32, of which `out` is the first, or into the split's part.
template <class T>
__device__ __forceinline__ void write(const WarpTile& tile, const float* slice, int32_t out) {
  constexpr int kLanes = kChunkBytes / sizeof(T), kChunks = kOutSlice / kLanes;
  const PackedConvolution& p = tile.p;
  const int32_t k = p.k, h = p.shape.h, w = p.shape.w;
#pragma unroll
  for (int item = threadIdx.x % 32; item < kWarpPixels * kChunks; item += 32) {
    const int row = item / kChunks, column = item % kChunks * kLanes;
    const Pixel at{tile.first.image, tile.first.row + row / kTileColumns, tile.first.column + row % kTileColumns};
    const int32_t channel = out + column;
    if (at.image >= p.shape.n || at.row >= h || at.column >= w || channel >= k) continue;
    float value[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[i] = slice[row * pitch_of(kOutSlice) + column + i];
    const int64_t pixel = (int64_t{at.image} * h + at.row) * w + at.column;
    Spot<T, kLanes> spot{value, at, pixel * k + channel, channel, k};
    if (tile.part) {
      store_part(value, tile.part + spot.at);
    } else {
      AllSteps::apply(p.out, spot);
    }
  }
}

template <class T, int kOuts>
__device__ __forceinline__ void write_tile(const WarpTile& tile, const float (&sum)[kOuts / 2], float* slice) {
  constexpr int kSums = kOutSlice / 2;  // of a thread in a slice
#pragma unroll 1
  for (int s = 0; s < kOuts / kOutSlice && tile.out + s * kOutSlice < tile.p.k; ++s) {
    // Registers have no address: the slice is picked by a branch, so that the steps are there once.
#pragma unroll
    for (int picked = 0; picked < kOuts / kOutSlice; ++picked) {
      if (picked == s) spread(sum + picked * kSums, slice);
    }
    __syncwarp();  // rows are read by other lanes than wrote them
    write<T>(tile, slice, tile.out + s * kOutSlice);
    __syncwarp();  // the slice has been read
  }
}

// ---- A plain way out (plan_sm90.h): finished in registers, stored by TMA --------------------------------------------

// Two buffers [16, 32] of 16-bit elements, in rows of 64 bytes that are swizzled by TMA as by narrow_chunk().
class Buffers {
 public:
  __device__ __forceinline__ explicit Buffers(uint32_t first) : first_(first) {}

  // 32 channels from `out` on into `map` [N, H, W, K]; what lies outside it is not stored.
  template <class T>
  __device__ __forceinline__ void store(const WarpTile& tile, const CUtensorMap& map, const float* sum, int32_t out) {
    const uint32_t lane = threadIdx.x % 32, buffer = first_ + turn_ * kBytes;
    uint32_t pairs[kOutSlice / 16][4];  // 8 channels of the upper and of the lower 8 pixels, then of the next channels
#pragma unroll
    for (int i = 0; i < kOutSlice / 4; ++i) pairs[i / 4][i % 4] = pair_of<T>(sum + i * 2);
    if (lane == 0) ptx::bulk_wait_read<1>();
    __syncwarp();  // the store before the last one has read this buffer
#pragma unroll
    for (int i = 0; i < kOutSlice / 16; ++i) {
      ptx::stmatrix_x4(buffer + narrow_chunk(lane % 16, i * 2 + lane / 16), pairs[i]);
    }
    ptx::fence_proxy_async();
    __syncwarp();  // all lanes have written
    if (lane == 0) {
      ptx::store_box(map, buffer, out, tile.first.column, tile.first.row, tile.first.image);
      ptx::bulk_commit();
    }
    turn_ ^= 1;
  }

 private:
  template <class T>
  static __device__ __forceinline__ uint32_t pair_of(const float* sum) {
    Pack<T, 2> pair;
    narrow(sum[0], &pair.lane[0]);
    narrow(sum[1], &pair.lane[1]);
    return reinterpret_cast<const uint32_t&>(pair);
  }

  static constexpr uint32_t kBytes = kWarpPixels * kOutSlice * 2;
  uint32_t first_, turn_ = 0;
};

// Bias and ReLU of a slice's sums, which are changed.
__device__ __forceinline__ void finish(const PackedConvolution& p, float* sum, int32_t out) {
  const int32_t k = p.k, first = out + threadIdx.x % 4 * 2;
  if (p.out.bias) {
#pragma unroll
    for (int n = 0; n < kOutSlice / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t channel = first + n * 8;
        const float bias = channel < k ? p.out.bias[channel + i] : 0.0f;
        sum[n * 4 + i] += bias;      // of the upper 8 pixels
        sum[n * 4 + 2 + i] += bias;  // of the lower ones
      }
    }
  }
  if (!p.out.relu) return;
#pragma unroll
  for (int i = 0; i < kOutSlice / 2; ++i) sum[i] = relu(sum[i]);
}

template <class T, int kOuts>
__device__ __forceinline__ void store_tile(const WarpTile& tile, float (&sum)[kOuts / 2], Buffers& buffers,
                                           const CUtensorMap& y, const CUtensorMap& relued) {
  constexpr int kSums = kOutSlice / 2;
#pragma unroll
  for (int s = 0; s < kOuts / kOutSlice; ++s) {
    const int32_t out = tile.out + s * kOutSlice;
    if (out >= tile.p.k) return;
    float* own = sum + s * kSums;
    finish(tile.p, own, out);
    buffers.store<T>(tile, y, own, out);
    if (!tile.p.out.relued) continue;
#pragma unroll
    for (int i = 0; i < kSums; ++i) own[i] = relu(own[i]);
    buffers.store<T>(tile, relued, own, out);
  }
}

// ---- One warp's way out, tile after tile ----------------------------------------------------------------------------

template <class T, int kOuts>
class WarpOut {
 public:
  // Its part of shared memory by both kinds of address; the maps are of a plain way out.
  __device__ __forceinline__ WarpOut(const PackedConvolution& p, const CUtensorMap& y, const CUtensorMap& relued,
                                     uint32_t own, void* slice)
      : p_(p), y_(y), relued_(relued), slice_(static_cast<float*>(slice)), buffers_(own), plain_(is_plain(p)) {}

  // A tile's sums, which are changed, of one split's input channels; `first` is the tile's first pixel.
  __device__ __forceinline__ void write(const Pixel& first, int32_t out, int32_t split, float (&sum)[kOuts / 2]) {
    constexpr int kWarpRows = kWarpPixels / kTileColumns;
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    const WarpTile tile{p_, {first.image, first.row + warp * kWarpRows, first.column}, out, part_of(p_, split)};
    if (plain_) {
      store_tile<T, kOuts>(tile, sum, buffers_, y_, relued_);
    } else {
      write_tile<T, kOuts>(tile, sum, slice_);
    }
  }

  // Shared memory has been read.
  __device__ __forceinline__ void finish() {
    if (plain_ && threadIdx.x % 32 == 0) ptx::bulk_wait_read<0>();
    __syncwarp();
  }

 private:
  const PackedConvolution& p_;
  const CUtensorMap &y_ /* [N, H, W, K] */, &relued_ /* [N, H, W, K] */;
  float* slice_;
  Buffers buffers_;
  bool plain_;
};

}  // namespace refinenet_fast::cuda::sm90
