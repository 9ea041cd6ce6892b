// wgmma: one warpgroup. Operands in shared memory are copied there as they lie in global memory; descriptors come
// ready but for the address of the copy, a pair for each step along k; accumulators are raw registers, a row a thread.

#include "ptx.cuh"
#include "wgmma.cuh"

extern __shared__ __align__(1024) ptx::u32 images[];

// Copies and makes the copy visible to the asynchronous proxy. Returns the address, in units of descriptors.
__device__ ptx::u64 fill(ptx::u32* to, const ptx::u32* from, ptx::u32 words) {
  for (ptx::u32 i = threadIdx.x; i < words; i += blockDim.x) to[i] = from[i];
  ptx::fence_proxy_async_shared();
  return ptx::shared_address(to) >> 4;
}

// image_a: (words_a,), image_b: (words_b,), multiples of 1024 bytes; descriptors: (steps, 2); d: (128, registers).
template <int steps, class Op, class T, int... flags>
__device__ void both_shared(const ptx::u32* image_a, ptx::u32 words_a, const ptx::u32* image_b, ptx::u32 words_b,
                            const ptx::u64* descriptors, ptx::u32 scale_d, T* d) {
  const ptx::u64 start_a = fill(images, image_a, words_a);
  const ptx::u64 start_b = fill(images + words_a, image_b, words_b);
  T fragment[Op::registers];
  for (int i = 0; i < Op::registers; ++i) fragment[i] = d[threadIdx.x * Op::registers + i];
  __syncthreads();
  for (int i = 0; i < Op::registers; ++i) ptx::keep(fragment[i]);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    Op::template ss<flags...>(fragment, descriptors[2 * step] + start_a, descriptors[2 * step + 1] + start_b,
                              step ? 1 : scale_d);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < Op::registers; ++i) {
    ptx::keep(fragment[i]);
    d[threadIdx.x * Op::registers + i] = fragment[i];
  }
}

// a: (128, 4); a single step.
template <class Op, class T, int... flags>
__device__ void a_registers(const ptx::u32* a, const ptx::u32* image_b, ptx::u32 words_b, const ptx::u64* descriptors,
                            ptx::u32 scale_d, T* d) {
  const ptx::u64 start_b = fill(images, image_b, words_b);
  ptx::u32 fragment_a[4];
  for (int i = 0; i < 4; ++i) fragment_a[i] = a[threadIdx.x * 4 + i];
  T fragment[Op::registers];
  for (int i = 0; i < Op::registers; ++i) fragment[i] = d[threadIdx.x * Op::registers + i];
  __syncthreads();
  for (int i = 0; i < 4; ++i) ptx::keep(fragment_a[i]);
  for (int i = 0; i < Op::registers; ++i) ptx::keep(fragment[i]);
  ptx::wgmma_fence();
  Op::template rs<flags...>(fragment, fragment_a, descriptors[1] + start_b, scale_d);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < Op::registers; ++i) {
    ptx::keep(fragment[i]);
    d[threadIdx.x * Op::registers + i] = fragment[i];
  }
}

// Flags: trans_a, trans_b, scale_a, scale_b (tf32: the scales).
#define SHARED(name, steps, Op, T, ...)                                                                       \
  extern "C" __global__ void __launch_bounds__(128)                                                           \
      name(const ptx::u32* image_a, ptx::u32 words_a, const ptx::u32* image_b, ptx::u32 words_b,              \
           const ptx::u64* descriptors, ptx::u32 scale_d, T* d) {                                             \
    both_shared<steps, ptx::Op, T, __VA_ARGS__>(image_a, words_a, image_b, words_b, descriptors, scale_d, d); \
  }
SHARED(bf16_n8, 4, WgmmaBf16<8>, float, 0, 0)
SHARED(bf16_n64, 8, WgmmaBf16<64>, float, 0, 0)
SHARED(bf16_n64_ta, 4, WgmmaBf16<64>, float, 1, 0)
SHARED(bf16_n64_tb, 4, WgmmaBf16<64>, float, 0, 1)
SHARED(bf16_n128_ta_tb, 4, WgmmaBf16<128>, float, 1, 1)
SHARED(bf16_n256, 2, WgmmaBf16<256>, float, 0, 0)
SHARED(bf16_n32_minus_a, 2, WgmmaBf16<32>, float, 0, 0, -1, 1)
SHARED(bf16_n32_minus_b, 2, WgmmaBf16<32>, float, 0, 0, 1, -1)
SHARED(f16_n64, 4, WgmmaF16<64>, float, 0, 0)
SHARED(f16_n128_tb, 2, WgmmaF16<128>, float, 0, 1)
SHARED(f16f16_n32, 4, WgmmaF16F16<32>, ptx::u32, 0, 0)
SHARED(f16f16_n128, 2, WgmmaF16F16<128>, ptx::u32, 0, 0)
SHARED(tf32_n8, 4, WgmmaTf32<8>, float, 1, 1)
SHARED(tf32_n64, 8, WgmmaTf32<64>, float, 1, 1)

// Flags: trans_b, scale_a, scale_b (tf32: the scales).
#define REGISTERS(name, Op, T, ...)                                                                                    \
  extern "C" __global__ void __launch_bounds__(128) name(const ptx::u32* a, const ptx::u32* image_b, ptx::u32 words_b, \
                                                         const ptx::u64* descriptors, ptx::u32 scale_d, T* d) {        \
    a_registers<ptx::Op, T, __VA_ARGS__>(a, image_b, words_b, descriptors, scale_d, d);                                \
  }
REGISTERS(bf16_n64_rs, WgmmaBf16<64>, float, 0, 1, 1)
REGISTERS(bf16_n128_rs_tb, WgmmaBf16<128>, float, 1, 1, 1)
REGISTERS(bf16_n32_rs_minus, WgmmaBf16<32>, float, 0, -1, 1)
REGISTERS(f16_n64_rs, WgmmaF16<64>, float, 0, 1, 1)
REGISTERS(f16f16_n32_rs, WgmmaF16F16<32>, ptx::u32, 0, 1, 1)
REGISTERS(tf32_n32_rs, WgmmaTf32<32>, float, 1, 1)
