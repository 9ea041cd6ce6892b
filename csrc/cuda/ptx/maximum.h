// max of float32 that NaN goes through (PTX ISA 9.7.3.12).
#pragma once

namespace refinenet_fast::cuda::ptx {

__device__ __forceinline__ float max_nan(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

}  // namespace refinenet_fast::cuda::ptx
