// Element types as tensor cores multiply them: how fragments are made of what lies in memory, and their product.
//
// A register holds two neighbouring 16-bit elements, or one of float32. Either way mma takes 32 bytes of each row of A
// and column of B, so that loads of fragments are the same for all types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/arguments.h"
#include "cuda/ptx/mma.h"

namespace refinenet_fast::cuda {

// Registers as they are: 16-bit types.
template <int kCount>
struct Fragment {
  uint32_t raw[kCount];

  __device__ __forceinline__ explicit Fragment(const uint32_t (&given)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) raw[i] = given[i];
  }
};

struct BFloat16 {
  using Element = __nv_bfloat16;
  template <int kCount>
  using Operand = Fragment<kCount>;

  // ReLU of both elements; NaN stays.
  static __device__ __forceinline__ uint32_t relu(uint32_t pair) {
    const __nv_bfloat162 positive =
        __hmax2_nan(reinterpret_cast<const __nv_bfloat162&>(pair), __float2bfloat162_rn(0.0f));
    return reinterpret_cast<const uint32_t&>(positive);
  }
  static __device__ __forceinline__ void multiply(float (&sum)[4], const Fragment<4>& a, const Fragment<2>& b) {
    ptx::mma_bf16(sum, a.raw, b.raw);
  }
};

struct Float16 {
  using Element = __half;
  template <int kCount>
  using Operand = Fragment<kCount>;

  static __device__ __forceinline__ uint32_t relu(uint32_t pair) {
    const __half2 positive = __hmax2_nan(reinterpret_cast<const __half2&>(pair), __float2half2_rn(0.0f));
    return reinterpret_cast<const uint32_t&>(positive);
  }
  static __device__ __forceinline__ void multiply(float (&sum)[4], const Fragment<4>& a, const Fragment<2>& b) {
    ptx::mma_f16(sum, a.raw, b.raw);
  }
};

// What both ways to multiply float32 share.
struct Float32 {
  using Element = float;

  static __device__ __forceinline__ uint32_t relu(uint32_t bits) {
    const float v = __uint_as_float(bits);
    return v <= 0.0f ? 0 : bits;
  }
};

// float32 rounded to TF32.
struct Tf32 : Float32 {
  template <int kCount>
  struct Operand {
    uint32_t rounded[kCount];

    __device__ __forceinline__ explicit Operand(const uint32_t (&raw)[kCount]) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) rounded[i] = ptx::to_tf32(__uint_as_float(raw[i]));
    }
  };
  static __device__ __forceinline__ void multiply(float (&sum)[4], const Operand<4>& a, const Operand<2>& b) {
    ptx::mma_tf32(sum, a.rounded, b.rounded);
  }
};

// float32 as the sum of two TF32 numbers, 22 bits of mantissa together. Of the four products the least, below 2^-22 of
// the largest, is left out; the others are summed from the smallest on.
struct Tf32x3 : Float32 {
  template <int kCount>
  struct Operand {
    uint32_t high[kCount], low[kCount];

    __device__ __forceinline__ explicit Operand(const uint32_t (&raw)[kCount]) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float v = __uint_as_float(raw[i]);
        high[i] = ptx::to_tf32(v);
        low[i] = ptx::to_tf32(v - __uint_as_float(high[i]));
      }
    }
  };
  static __device__ __forceinline__ void multiply(float (&sum)[4], const Operand<4>& a, const Operand<2>& b) {
    ptx::mma_tf32(sum, a.low, b.high);
    ptx::mma_tf32(sum, a.high, b.low);
    ptx::mma_tf32(sum, a.high, b.high);
  }
};

// choose(Math{}) for a request's elements; null where there is no such type.
template <class Request, class Choose>
auto by_arithmetic(const Request& p, const Choose& choose) -> decltype(choose(BFloat16{})) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return choose(BFloat16{});
    case DType::kFloat16:
      return choose(Float16{});
    case DType::kFloat32:
      return p.exact ? choose(Tf32x3{}) : choose(Tf32{});
  }
  return nullptr;
}

// ---- Ways in: what a product does to the registers of its pixels
// -------------------------------------------------------

struct Unchanged {
  template <class Math, int kCount>
  static __device__ __forceinline__ void apply(uint32_t (&)[kCount]) {}
};

struct Rectified {
  template <class Math, int kCount>
  static __device__ __forceinline__ void apply(uint32_t (&raw)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) raw[i] = Math::relu(raw[i]);
  }
};

}  // namespace refinenet_fast::cuda
