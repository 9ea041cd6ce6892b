// ldmatrix, stmatrix, movmatrix: every lane's address and registers come from, or go to, global memory unchanged.

#include "ptx.cuh"

constexpr int kWords = 256;  // shared memory: 64 rows of 8 elements of 16 bits

// image: (kWords,); offsets: (32,) bytes; d: (32, matrices).
#define LOAD(matrices, suffix)                                                                                       \
  extern "C" __global__ void load_x##matrices##suffix(const ptx::u32* image, const ptx::u32* offsets, ptx::u32* d) { \
    __shared__ __align__(16) ptx::u32 rows[kWords];                                                                  \
    for (int i = threadIdx.x; i < kWords; i += 32) rows[i] = image[i];                                               \
    __syncthreads();                                                                                                 \
    ptx::u32 fragment[matrices];                                                                                     \
    ptx::ldmatrix_x##matrices##suffix(fragment, ptx::shared_address(rows) + offsets[threadIdx.x]);                   \
    for (int i = 0; i < matrices; ++i) d[threadIdx.x * matrices + i] = fragment[i];                                  \
  }
LOAD(1, )
LOAD(2, )
LOAD(4, )
LOAD(1, _trans)
LOAD(2, _trans)
LOAD(4, _trans)

// a: (32, matrices); image: (kWords,), what shared memory holds before and, in the end, after.
#define STORE(matrices, suffix)                                                                                       \
  extern "C" __global__ void store_x##matrices##suffix(const ptx::u32* a, const ptx::u32* offsets, ptx::u32* image) { \
    __shared__ __align__(16) ptx::u32 rows[kWords];                                                                   \
    for (int i = threadIdx.x; i < kWords; i += 32) rows[i] = image[i];                                                \
    __syncthreads();                                                                                                  \
    ptx::u32 fragment[matrices];                                                                                      \
    for (int i = 0; i < matrices; ++i) fragment[i] = a[threadIdx.x * matrices + i];                                   \
    ptx::stmatrix_x##matrices##suffix(ptx::shared_address(rows) + offsets[threadIdx.x], fragment);                    \
    __syncthreads();                                                                                                  \
    for (int i = threadIdx.x; i < kWords; i += 32) image[i] = rows[i];                                                \
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
STORE(1, )
STORE(2, )
STORE(4, )
STORE(1, _trans)
STORE(2, _trans)
STORE(4, _trans)
#endif

// a, d: (32,).
extern "C" __global__ void transpose(const ptx::u32* a, ptx::u32* d) {
  d[threadIdx.x] = ptx::movmatrix_trans(a[threadIdx.x]);
}
