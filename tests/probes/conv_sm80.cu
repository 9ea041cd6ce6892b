// 3x3 convolution, stride 1, zero padding 1, NHWC, as an implicit product of matrices on Ampere: pixels x (tap, input
// channel) times (tap, input channel) x output channels. Slices of both operands pass through a ring of three stages
// in shared memory, filled by cp.async. Any N, H, W; C and K are multiples of 8, the elements of one copy.
#include "ptx.cuh"

namespace {

using bf16 = __nv_bfloat16;
using ptx::u32;

constexpr int kThreads = 128;              // 2x2 warps, each with 32 pixels x 32 output channels
constexpr int kPixels = 64, kOut = 64;     // of a tile
constexpr int kSlice = 32;                 // input channels of a stage
constexpr int kVector = 8;                 // channels of a 16-byte chunk
constexpr int kChunks = kSlice / kVector;  // of a row of a stage
constexpr int kStages = 3;
constexpr int kTaps = 9;
constexpr u32 kRowBytes = kSlice * sizeof(bf16);
constexpr u32 kOperandBytes = 64 * kRowBytes;
constexpr u32 kStageBytes = 2 * kOperandBytes;  // pixels, then weights
constexpr int kPitch = kOut + 8;                // floats from row to row of the epilogue's tile: rows in other banks
static_assert(kPixels * kPitch * sizeof(float) <= kStages * kStageBytes, "the epilogue reuses the ring");

struct Shape {
  int n, h, w, c, k;
};

// Where a chunk of a row of a stage lies. The eight rows of an ldmatrix, 64 bytes each, are 4 lines of 32 banks;
// turning the chunks of each line by its number puts all eight into different banks.
__device__ __forceinline__ u32 swizzled(u32 row, u32 chunk) {
  return row * kRowBytes + (chunk ^ (row >> 1 & 3)) * 16;  // swizzle of both sides
}

// What one thread copies of every stage: the same chunk of two pixels and of two output channels.
struct Loader {
  const bf16 *x /* (N, H, W, C) */, *w /* (K, 3, 3, C) */;
  Shape s;
  int slices, chunk, row, out;
  int pixel[2], y[2], column[2];

  __device__ Loader(const bf16* x, const bf16* w, const Shape& s)
      : x(x),
        w(w),
        s(s),
        slices((s.c + kSlice - 1) / kSlice),
        chunk(threadIdx.x % kChunks),
        row(threadIdx.x / kChunks) {
    out = blockIdx.y * kOut + row;
    for (int i = 0; i < 2; ++i) {
      pixel[i] = blockIdx.x * kPixels + row + 32 * i;
      column[i] = pixel[i] % s.w;
      y[i] = pixel[i] / s.w % s.h;
    }
  }

  __device__ int steps() const { return kTaps * slices; }

  // Starts the copies of one tap and slice. What is outside the image or the channels reads 0 bytes, from an address
  // that is valid all the same, and the chunk becomes zeros.
  __device__ void load(int step, u32 stage) const {
    const int tap = step / slices, channel = step % slices * kSlice + chunk * kVector;
    const int dy = tap / 3 - 1, dx = tap % 3 - 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool in_row = column[i] + dx >= 0 && column[i] + dx < s.w;
      const bool in_column = y[i] + dy >= 0 && y[i] + dy < s.h;
      const bool in_batch = pixel[i] < s.n * s.h * s.w;
      const bool copied = in_row && in_column && in_batch && channel < s.c;
      const int64_t from = (int64_t{pixel[i]} + dy * s.w + dx) * s.c + channel;
      ptx::cp_async_cg(stage + swizzled(row + 32 * i, chunk), copied ? x + from : x, copied ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool given = out + 32 * i < s.k && channel < s.c;
      const int64_t from = (int64_t{out} + 32 * i) * kTaps * s.c + tap * s.c + channel;
      ptx::cp_async_cg(stage + kOperandBytes + swizzled(row + 32 * i, chunk), given ? w + from : w, given ? 16 : 0);
    }
  }
};

// acc += the products of one stage, for a warp's 32 pixels x 32 output channels.
__device__ __forceinline__ void multiply(u32 stage, int warp, int lane, float (&acc)[2][4][4]) {
  const u32 weights = stage + kOperandBytes;
  const u32 first_pixel = warp / 2 * 32, first_out = warp % 2 * 32;
#pragma unroll
  for (int k = 0; k < kChunks; k += 2) {
    u32 a[2][4], b[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      // Matrices in the order of mma's operand A: upper rows, lower rows, then the same 8 channels on.
      ptx::ldmatrix_x4(a[m], stage + swizzled(first_pixel + m * 16 + lane % 16, k + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      // Two operands B: 8 output channels at both halves of the channels, then the next 8.
      ptx::ldmatrix_x4(b[n], weights + swizzled(first_out + n * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const u32 operand[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
        ptx::mma_m16n8k16_bf16(acc[m][n], a[m], operand, acc[m][n]);
      }
    }
  }
}

__device__ __forceinline__ float2 widen(u32 pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

__device__ __forceinline__ u32 narrow(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const u32&>(pair);
}

}  // namespace

// Grid: tiles of pixels, tiles of output channels.
extern "C" __global__ void __launch_bounds__(kThreads)
    conv3x3_sm80(const bf16* x /* (N, H, W, C) */, const bf16* w /* (K, 3, 3, C) */, const float* bias /* (K,) */,
                 const bf16* residual /* (N, H, W, K) or null */, bf16* y /* (N, H, W, K) */, int n, int h, int width,
                 int c, int k) {
  __shared__ __align__(128) unsigned char shared[kStages * kStageBytes];
  const u32 ring = ptx::shared_address(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Loader loader(x, w, {n, h, width, c, k});
  const int steps = loader.steps();

  // A group of copies for every step, an empty one where nothing is left to load: so waiting for all groups but the
  // last kStages - 2 always means waiting for the step's own.
  for (int step = 0; step < kStages - 1; ++step) {
    loader.load(step, ring + step * kStageBytes);
    ptx::cp_async_commit();  // commit: a stage before the loop
  }
  float acc[2][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();  // wait: this thread's copies of the step
    __syncthreads();  // everyone's copies are there, and everyone has done with the stage that is loaded next
    const int next = step + kStages - 1;
    if (next < steps) loader.load(next, ring + next % kStages * kStageBytes);
    ptx::cp_async_commit();  // commit: a stage, or nothing
    multiply(ring + step % kStages * kStageBytes, warp, lane, acc);
  }
  __syncthreads();  // the ring has been read; nothing is being copied into it, as the last groups were empty

  // Sums go through shared memory, so that global memory sees rows of 128 bytes instead of pairs.
  float* tile = reinterpret_cast<float*>(shared);  // (kPixels, kPitch)
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float* pair = tile + (warp / 2 * 32 + m * 16 + lane / 4) * kPitch + warp % 2 * 32 + j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(pair) = make_float2(acc[m][j][0], acc[m][j][1]);
      *reinterpret_cast<float2*>(pair + 8 * kPitch) = make_float2(acc[m][j][2], acc[m][j][3]);
    }
  }
  __syncthreads();  // rows are read by other warps than wrote them

  for (int item = thread; item < kPixels * kOut / kVector; item += kThreads) {
    const int row = item / (kOut / kVector), column = item % (kOut / kVector) * kVector;
    const int64_t pixel = int64_t{blockIdx.x} * kPixels + row;
    const int out = blockIdx.y * kOut + column;
    if (pixel >= int64_t{n} * h * width || out >= k) continue;  // bound: of pixels and of output channels
    const float4* sums = reinterpret_cast<const float4*>(tile + row * kPitch + column);
    const float4* offsets = reinterpret_cast<const float4*>(bias + out);
    const float4 sum[2] = {sums[0], sums[1]}, offset[2] = {offsets[0], offsets[1]};
    uint4 added = make_uint4(0, 0, 0, 0);
    if (residual != nullptr) added = *reinterpret_cast<const uint4*>(residual + pixel * k + out);
    const float2 add[4] = {widen(added.x), widen(added.y), widen(added.z), widen(added.w)};
    const uint4 rounded = make_uint4(narrow(sum[0].x + offset[0].x + add[0].x, sum[0].y + offset[0].y + add[0].y),
                                     narrow(sum[0].z + offset[0].z + add[1].x, sum[0].w + offset[0].w + add[1].y),
                                     narrow(sum[1].x + offset[1].x + add[2].x, sum[1].y + offset[1].y + add[2].y),
                                     narrow(sum[1].z + offset[1].z + add[3].x, sum[1].w + offset[1].w + add[3].y));
    *reinterpret_cast<uint4*>(y + pixel * k + out) = rounded;
  }
}
