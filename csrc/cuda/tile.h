// What a convolution's block does with its tile of pixels and output channels, whatever the way in: copies of weights,
// products of one stage, the way out.
#pragma once

#include "cuda/arithmetic.h"
#include "cuda/ring.h"
#include "cuda/way_out.h"

namespace refinenet_fast::cuda {

// The kernels' own copy of what is derived from the request.
struct Request {
  PackedConvolution p;
  Divider h, w;    // of pixels; of tiles where a block's pixels are one
  bool whole_out;  // whether the maps of the way out are whole chunks at multiples of 16 bytes
  int piece;       // as in the plan
};

// kPixels x kOuts, a square of it for each of four warps.
template <int kPixels_, int kOuts_>
struct Tile {
  static constexpr int kPixels = kPixels_, kOuts = kOuts_;
  static constexpr int kEdge = kPixels * kOuts == 4 * 64 * 64 ? 64 : 32;  // of a warp's square
  static constexpr int kAcross = kOuts / kEdge;                           // warps beside each other
  static_assert(kPixels * kOuts == 4 * kEdge * kEdge, "a square for each warp");

  // Of 16 pixels x 8 output channels; lanes hold four elements each.
  using Sums = float[kEdge / 16][kEdge / 8][4];

  static __device__ __forceinline__ int pixel() { return threadIdx.x / 32 / kAcross * kEdge; }  // of the warp
  static __device__ __forceinline__ int out() { return threadIdx.x / 32 % kAcross * kEdge; }
};

constexpr int kSliceChunks = kNarrowRow / kChunkBytes;  // of a pixel's or an output's slice of channels
constexpr int kRowsAtOnce = kProductThreads / kSliceChunks;

// What one thread copies of the weights of every stage: the same chunk of kRows output channels.
template <class T, int kOuts>
class WeightLoader {
 public:
  __device__ __forceinline__ WeightLoader(const PackedConvolution& p, int32_t first_out)
      : weights_(static_cast<const T*>(p.weights)), row_(threadIdx.x / kSliceChunks) {
    chunk_ = threadIdx.x % kSliceChunks;
    pitch_ = blocks_of<int32_t>(p.shape.c, kLanes) * kLanes;
    tap_stride_ = p.turned ? -p.k * pitch_ : p.k * pitch_;
    outs_left_ = static_cast<int32_t>(p.k) - first_out - row_;
    const int64_t last_tap = (p.side * p.side - 1) * p.k * pitch_;
    own_ = weights_ + int64_t{first_out + row_} * pitch_ + chunk_ * kLanes + (p.turned ? last_tap : 0);
  }

  // Starts the copies of one tap of the slice, of whose chunk `lanes` elements exist. Packed weights are whole chunks,
  // whatever the pixels are.
  __device__ __forceinline__ void operator()(uint32_t rows, int32_t tap, int lanes) const {
    const T* from = own_ + tap * tap_stride_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool given = i * kRowsAtOnce < outs_left_;
      CopyChunks::copy(rows + narrow_chunk(row_ + i * kRowsAtOnce, chunk_), from + i * kRowsAtOnce * int64_t{pitch_},
                       given ? lanes : 0, weights_, kChunkBytes);
    }
  }

  __device__ __forceinline__ void skip(int32_t slices) { own_ += slices * (kSliceChunks * kLanes); }

 private:
  static constexpr int kLanes = kChunkBytes / sizeof(T), kRows = kOuts / kRowsAtOnce;

  const T *weights_ /* [TAPS, K, PITCH] */, *own_ /* at this thread's first output and channel */;
  int64_t tap_stride_;  // from tap to tap; of turned weights negative
  int32_t pitch_, outs_left_;
  int row_, chunk_;
};

// sum += the products of one stage, for a warp's square. The tile's pixel i lies in row row_of(i) of `pixels`.
template <class Math, class In, class Tile, class RowOf>
__device__ __forceinline__ void multiply_stage(uint32_t pixels, uint32_t weights, const RowOf& row_of,
                                               typename Tile::Sums& sum) {
  constexpr int kRows = Tile::kEdge / 16, kColumns = Tile::kEdge / 8;
  const uint32_t lane = threadIdx.x % 32, pixel = Tile::pixel(), out = Tile::out();
#pragma unroll
  for (int chunk = 0; chunk < kSliceChunks; chunk += 2) {
    uint32_t a[kRows][4], b[kColumns / 2][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      // Matrices in the order of operand A: upper rows, lower rows, then both again one chunk on.
      ptx::ldmatrix_x4(a[m], pixels + narrow_chunk(row_of(pixel + m * 16 + lane % 16), chunk + lane / 16));
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

// The warps' sums as one tile [kPixels, pitch_of(kOuts)] in shared memory.
template <class Tile>
__device__ __forceinline__ void spread(const typename Tile::Sums& sum, float* tile) {
  constexpr int kPitch = pitch_of(Tile::kOuts);
  const int lane = threadIdx.x % 32, row = Tile::pixel() + lane / 4, column = Tile::out() + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < Tile::kEdge / 16; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kEdge / 8; ++n) {
      float* pair = tile + (row + m * 16) * kPitch + column + n * 8;
      *reinterpret_cast<float2*>(pair) = make_float2(sum[m][n][0], sum[m][n][1]);
      *reinterpret_cast<float2*>(pair + 8 * kPitch) = make_float2(sum[m][n][2], sum[m][n][3]);
    }
  }
}

// A pixel of the tile in the image.
struct Place {
  Pixel pixel;
  int32_t number;  // in memory
  bool inside;     // whether there is one
};

// The way out of a tile, or into `part` [N, H, W, K] of one split, V neighbouring output channels at a time;
// place_of(i) is that of the tile's pixel i.
template <class T, int V, class Tile, class PlaceOf>
__device__ __forceinline__ void write(const WayOut& out, float* part, const float* tile, const PlaceOf& place_of,
                                      int32_t first_out, int32_t k) {
  for (int item = threadIdx.x; item < Tile::kPixels * Tile::kOuts / V; item += kProductThreads) {
    const int row = item / (Tile::kOuts / V), column = item % (Tile::kOuts / V) * V;
    const Place place = place_of(row);
    const int32_t channel = first_out + column;
    if (!place.inside || channel >= k) continue;
    float value[V];
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = tile[row * pitch_of(Tile::kOuts) + column + i];
    Spot<T, V> spot{value, place.pixel, int64_t{place.number} * k + channel, channel, k};
    if (part) {
      store_part(value, part + spot.at);
    } else {
      AllSteps::apply(out, spot);
    }
  }
}

// All of it, through shared memory, so that global memory sees whole rows instead of pairs.
template <class T, class Tile, class PlaceOf>
__device__ __forceinline__ void finish(const Request& request, const typename Tile::Sums& sum, unsigned char* shared,
                                       const PlaceOf& place_of, int32_t first_out, float* part = nullptr) {
  float* tile = reinterpret_cast<float*>(shared);
  spread<Tile>(sum, tile);
  __syncthreads();  // rows are read by other warps than wrote them
  const int32_t k = request.p.k;
  if (request.whole_out) {
    write<T, kChunkBytes / sizeof(T), Tile>(request.p.out, part, tile, place_of, first_out, k);
  } else {
    write<T, 1, Tile>(request.p.out, part, tile, place_of, first_out, k);
  }
}

}  // namespace refinenet_fast::cuda
