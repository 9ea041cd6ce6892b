// Loads, stores and atomic operations on every kind of memory.

#include "ptx.cuh"

using ptx::u16;
using ptx::u32;
using ptx::u64;
using ptx::u8;

// from, to: (32, 16) bytes: by v4.u8, v2.u16 and v2.u32.
extern "C" __global__ void vectors(const u8* from, u8* to) {
  from += 16 * threadIdx.x;
  to += 16 * threadIdx.x;
  u32 a, b, c, d;
  asm volatile("ld.global.v4.u8 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(from));
  asm volatile("st.global.v4.u8 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
  u16 e, f;
  asm volatile("ld.global.nc.v2.u16 {%0, %1}, [%2+4];" : "=h"(e), "=h"(f) : "l"(from));
  asm volatile("st.global.v2.u16 [%0+4], {%1, %2};" ::"l"(to), "h"(e), "h"(f) : "memory");
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2+8];" : "=r"(a), "=r"(b) : "l"(from));
  asm volatile("st.global.v2.u32 [%0+8], {%1, %2};" ::"l"(to), "r"(a), "r"(b) : "memory");
}

// from, to: (32, 4) and (32, 2) of 64 bits: v4.f32 and v2.u64, to the mirror image's place.
extern "C" __global__ void wide_vectors(const float* from, float* to, const u64* from_wide, u64* to_wide) {
  const u32 i = threadIdx.x, j = 31 - i;
  float a, b, c, d;
  asm volatile("ld.global.ca.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(a), "=f"(b), "=f"(c), "=f"(d) : "l"(from + 4 * i));
  asm volatile("st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + 4 * j), "f"(d), "f"(c), "f"(b), "f"(a)
               : "memory");
  u64 e, f;
  asm volatile("ld.global.v2.u64 {%0, %1}, [%2];" : "=l"(e), "=l"(f) : "l"(from_wide + 2 * i));
  asm volatile("st.global.v2.u64 [%0], {%1, %2};" ::"l"(to_wide + 2 * j), "l"(f), "l"(e) : "memory");
}

// from: (32, 4) bytes; d: (32, 5): what each extends to 32 bits. Stores keep the low bits: narrow: (32,) u8.
extern "C" __global__ void extends(const u8* from, u32* d, u8* narrow) {
  from += 4 * threadIdx.x;
  d += 5 * threadIdx.x;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(d[0]) : "l"(from));
  asm volatile("ld.global.s8 %0, [%1];" : "=r"(d[1]) : "l"(from));
  asm volatile("ld.global.u16 %0, [%1+2];" : "=r"(d[2]) : "l"(from));
  asm volatile("ld.global.s16 %0, [%1+2];" : "=r"(d[3]) : "l"(from));
  asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(d[4]) : "l"(from));
  asm volatile("st.global.u8 [%0], %1;" ::"l"(narrow + threadIdx.x), "r"(d[4] >> 4) : "memory");
}

__constant__ u32 table[8] = {2, 3, 5, 7, 11, 13, 17, 19};

// a, d: (64,). An array in local memory, indexed by values; constant memory likewise.
extern "C" __global__ void local_constant(const u32* a, u32* d) {
  const u32 i = threadIdx.x;
  volatile u32 mine[16];
  for (u32 j = 0; j < 16; ++j) mine[j] = i * 16 + j;
  for (u32 j = 0; j < 4; ++j) mine[(a[i] + j) % 16] += table[(a[i] >> 4) % 8] * (j + 1);
  u32 sum = 0;
  for (u32 j = 0; j < 16; ++j) sum = sum * 3 + mine[j];
  d[i] = sum;
}

extern __shared__ __align__(16) u32 dynamic_words[];

// a, d: (64,). Static and dynamic shared memory, read through generic addresses that may be of either or of global.
extern "C" __global__ void shared_kinds(const u32* a, u32* d) {
  __shared__ u32 words[64];
  __shared__ u8 bytes[64];
  const u32 i = threadIdx.x;
  words[i] = a[i];
  dynamic_words[i] = a[i] ^ 0xffff;
  bytes[i] = static_cast<u8>(a[i] >> 8);
  __syncthreads();
  const u32* from = i % 3 == 0 ? words + 63 - i : i % 3 == 1 ? dynamic_words + 63 - i : a + i;
  u32 value;
  asm volatile("ld.u32 %0, [%1];" : "=r"(value) : "l"(from));
  d[i] = value + bytes[63 - i];
}

// a: (64,), d, d_shared: (11,), sum: (1,): sums, extrema and bits over all threads and what d had, in global and in
// shared memory; d[8]: how many threads found the value they tried to change; d[9]: all that was exchanged.
extern "C" __global__ void atomics(const u32* a, u32* d, u32* d_shared, float* sum) {
  __shared__ u32 words[11];
  const u32 i = threadIdx.x, value = a[i];
  if (i < 11) words[i] = d[i];
  __syncthreads();
  const auto all = [&](u32* to) {
    atomicAdd(to, value);
    atomicMin(to + 1, value);
    atomicMax(to + 2, value);
    atomicMin(reinterpret_cast<int*>(to + 3), static_cast<int>(value));
    atomicMax(reinterpret_cast<int*>(to + 4), static_cast<int>(value));
    atomicOr(to + 5, value);
    atomicXor(to + 6, value);
    if (atomicCAS(to + 7, 0, i + 1) == 0) atomicAdd(to + 8, 1);
    atomicAdd(to + 9, atomicExch(to + 10, i + 1));
  };
  // Who came first, and who last, is open; that one did is not.
  const auto settle = [&](u32* to) {
    to[7] = to[7] >= 1 && to[7] <= 64;
    to[9] += to[10];
    to[10] = 0;
  };
  all(d);
  all(words);
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(sum), "f"(static_cast<float>(value % 1024)) : "memory");
  __syncthreads();
  if (i == 0) {
    settle(d);
    settle(words);
  }
  __syncthreads();
  if (i < 11) d_shared[i] = words[i];
}

// taken: (1,), seen: (threads,), zero: every ticket is handed out once.
extern "C" __global__ void tickets(u32* taken, u32* seen) { atomicAdd(seen + atomicAdd(taken, 1), 1); }

// a: (blocks, 64), partial: (blocks,), d: (1,), count: (1,) zero. The last block to arrive adds up what all have left.
extern "C" __global__ void last_block(const u32* a, u32* partial, u32* d, u32* count) {
  __shared__ u32 sum, last;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, a[64 * blockIdx.x + threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicInc(count, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    __threadfence();
    u32 total = 0;
    for (u32 i = 0; i < gridDim.x; ++i) total += *static_cast<volatile u32*>(partial + i);
    *d = total;
  }
}

// a: (32,); d: (2,), sum and maximum in 64 bits; halves: (2,), sums.
extern "C" __global__ void wide_atomics(const u32* a, u64* d, __half2* halves) {
  const u32 value = a[threadIdx.x];
  atomicAdd(reinterpret_cast<unsigned long long*>(d), static_cast<unsigned long long>(value) << 20);
  atomicMax(reinterpret_cast<unsigned long long*>(d + 1), static_cast<unsigned long long>(value) << 32);
  atomicAdd(halves, __half2(__float2half(static_cast<float>(value % 8)), __float2half(-static_cast<float>(value % 4))));
}
