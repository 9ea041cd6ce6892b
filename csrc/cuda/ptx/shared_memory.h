// Loads from shared memory and stores to it by 32-bit addresses: four 8x8 matrices at once, single words, chunks.
#pragma once

#include <cstdint>

namespace refinenet_fast::cuda::ptx {

// Lanes 8 i ... 8 i + 7 give the addresses of matrix i's rows of 16 bytes; lane l gets word l % 4 of row l / 4 of each:
// two neighbouring 16-bit elements or one 32-bit element (PTX ISA 9.7.14.5.15).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row)
               : "memory");
}

// The same of the transposed matrices, 16-bit elements only: lane l gets elements l % 4 * 2 and the next of column l
// / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row)
               : "memory");
}

// The inverse of ldmatrix_x4; sm_90 (9.7.14.5.16).
__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&d)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(d[0]), "r"(d[1]),
               "r"(d[2]), "r"(d[3])
               : "memory");
}

// ld.shared (PTX ISA 9.7.9.8).
__device__ __forceinline__ uint32_t load_word(uint32_t from) {
  uint32_t d;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(d) : "r"(from) : "memory");
  return d;
}

__device__ __forceinline__ uint2 load_8(uint32_t from) {
  uint2 d;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "r"(from) : "memory");
  return d;
}

// st.shared (PTX ISA 9.7.9.11).
__device__ __forceinline__ void store_8(uint32_t to, const uint2& v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void store_16(uint32_t to, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

}  // namespace refinenet_fast::cuda::ptx
