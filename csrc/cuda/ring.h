// The main loop that both products share: copies into a ring of stages in shared memory, ahead of the tensor cores.
#pragma once

#include "cuda/index.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/shared_memory.h"

namespace refinenet_fast::cuda {

// ---- How a chunk of 16 bytes, of which `lanes` elements exist, gets into shared memory
// ---------------------------------

// Behind the thread's back: whole chunks of aligned memory, or none, which makes zeros. `from` may be anywhere then.
struct CopyChunks {
  template <class T>
  static __device__ __forceinline__ void copy(uint32_t to, const T* from, int lanes, const T* valid) {
    ptx::cp_async_16(to, lanes > 0 ? from : valid, lanes > 0 ? kChunkBytes : 0);
  }
};

// Through registers, element by element: any number of channels at any address.
struct CopyElements {
  template <class T>
  static __device__ __forceinline__ void copy(uint32_t to, const T* from, int lanes, const T*) {
    constexpr int kLanes = kChunkBytes / sizeof(T);
    union {
      uint4 bits;
      T lane[kLanes];
    } chunk;
    chunk.bits = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if (i < lanes) chunk.lane[i] = from[i];
    }
    ptx::store_16(to, chunk.bits);
  }
};

// load(stage) for each of `steps` in turn, kStages - 1 steps ahead of multiply(stage). When it returns, no copy is on
// its way and nobody reads the ring.
template <class Load, class Multiply>
__device__ __forceinline__ void through_ring(uint32_t ring, uint32_t stage_bytes, int steps, const Load& load,
                                             const Multiply& multiply) {
  // A group of copies for every step, an empty one where nothing is left to load: so waiting for all groups but the
  // newest kStages - 2 always means waiting for the step's own.
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(ring + step * stage_bytes);
    ptx::cp_async_commit();  // of a stage before the loop
  }
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();  // this thread's copies of the step
    // Everyone's copies are there, and the stage that is loaded next has been read.
    __syncthreads();
    const int next = step + kStages - 1;
    if (next < steps) load(ring + next % kStages * stage_bytes);
    ptx::cp_async_commit();  // of a stage, or of nothing
    multiply(ring + step % kStages * stage_bytes);
  }
  __syncthreads();  // the ring has been read
}

// sum[m][n] += a[m] b[n] for a warp's tiles of 16 x 8; b[n] has the operands of two tiles beside each other.
template <class Math, int kRows, int kColumns>
__device__ __forceinline__ void multiply_all(const uint32_t (&a)[kRows][4], const uint32_t (&b)[kColumns / 2][4],
                                             float (&sum)[kRows][kColumns][4]) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const uint32_t column[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
    const typename Math::template Operand<2> right{column};
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const typename Math::template Operand<4> left{a[m]};  // the same for all n: made once
      Math::multiply(sum[m][n], left, right);
    }
  }
}

}  // namespace refinenet_fast::cuda
