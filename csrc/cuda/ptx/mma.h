// mma.sync: D (16, 8) += A (16, k) B (k, 8), float32 sums, a warp at a time (PTX ISA 9.7.14.5.14).
//
// Lane l holds (9.7.14.5.8 for 16-bit types, two elements a register; 9.7.14.5.6 for tf32, one):
//   A  a[0] row l / 4,  a[1] row l / 4 + 8,  word l % 4 of the row's first 16 bytes;  a[2], a[3] of its next 16
//   B  b[0] column l / 4, word l % 4 of the column's first 16 bytes;  b[1] of its next 16
//   D  d[0], d[1] row l / 4, columns l % 4 * 2 and the next;  d[2], d[3] the same of row l / 4 + 8
#pragma once

#include <cstdint>

namespace refinenet_fast::cuda::ptx {

#define REFINENET_FAST_MMA(NAME, SHAPE, TYPE)                                                           \
  __device__ __forceinline__ void NAME(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE                                \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
  }
REFINENET_FAST_MMA(mma_bf16, "m16n8k16", "bf16")
REFINENET_FAST_MMA(mma_f16, "m16n8k16", "f16")
REFINENET_FAST_MMA(mma_tf32, "m16n8k8", "tf32")
#undef REFINENET_FAST_MMA

// float32 to the nearest tf32, whose last 13 bits are zeros; without this mma cuts them off (PTX ISA 9.7.9.22, cvt).
__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t d;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(d) : "f"(v));
  return d;
}

}  // namespace refinenet_fast::cuda::ptx
