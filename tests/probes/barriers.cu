// Barriers of parts of a block, barriers that reduce, and registers handed between warpgroups.

#include "ptx.cuh"

using ptx::u32;

// Warps 0 and 1, and 2 and 3, exchange rows for `rounds` rounds behind barriers of their own. a: (128,), d: (rounds,
// 128): in each round a thread gets the value of its mirror image in the pair, plus 1.
extern "C" __global__ void pairs(const u32* a, u32 rounds, u32* d) {
  __shared__ u32 values[128];
  const u32 i = threadIdx.x, id = 1 + i / 64;
  u32 value = a[i];
  for (u32 round = 0; round < rounds; ++round) {
    values[i] = value;
    ptx::bar_sync(id, 64);
    value = values[i / 64 * 64 + 63 - i % 64] + 1;
    ptx::bar_sync(id, 64);
    d[128 * round + i] = value;
  }
}

// Warp 0 produces without waiting for its goods to be used (bar.arrive), warp 1 consumes. a, d: (rounds, 32).
extern "C" __global__ void producer(const u32* a, u32 rounds, u32* d) {
  __shared__ u32 values[2][32];
  const u32 lane = threadIdx.x % 32;
  // Barriers 1 and 2: slot full; 3 and 4: slot empty.
  for (u32 round = 0; round < rounds; ++round) {
    const u32 slot = round % 2;
    if (threadIdx.x < 32) {
      if (round >= 2) ptx::bar_sync(3 + slot, 64);
      values[slot][lane] = a[32 * round + lane] + round;
      ptx::bar_arrive(1 + slot, 64);
    } else {
      ptx::bar_sync(1 + slot, 64);
      d[32 * round + lane] = values[slot][31 - lane];
      if (round + 2 < rounds) ptx::bar_arrive(3 + slot, 64);
    }
  }
}

// a: (96,); d: (96, 5). Three warps: popc, and, or over all of them; popc over the first two; __syncthreads_count.
extern "C" __global__ void reduce(const u32* a, u32* d) {
  const u32 i = threadIdx.x, value = a[i];
  u32 r[5] = {};
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.ne.u32 p, %3, 0;\n"
      "bar.red.popc.u32 %0, 1, p;\n"
      "setp.lt.u32 p, %3, 9;\n"
      "bar.red.and.pred q, 1, p;\n"
      "selp.u32 %1, 1, 0, q;\n"
      "setp.eq.u32 p, %3, 7;\n"
      "bar.red.or.pred q, 1, 96, p;\n"
      "selp.u32 %2, 1, 0, q;\n}"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2])
      : "r"(value)
      : "memory");
  if (i < 64) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.u32 p, %1, 0;\n"
        "bar.red.popc.u32 %0, 2, 64, !p;\n}"
        : "=r"(r[3])
        : "r"(value)
        : "memory");
  }
  r[4] = __syncthreads_count(value > 3);
  for (int j = 0; j < 5; ++j) d[5 * i + j] = r[j];
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Warpgroup 0 gives registers away, 1 and 2 take them. a: (128,), d: (256,).
extern "C" __global__ void __launch_bounds__(384, 1) registers(const u32* a, u32* d) {
  __shared__ u32 values[128];
  const u32 i = threadIdx.x;
  if (i < 128) {
    ptx::setmaxnreg_dec<40>();
    values[i] = a[i] + 1;
    ptx::bar_arrive(1, 384);
  } else {
    ptx::setmaxnreg_inc<232>();
    ptx::bar_sync(1, 384);
    d[i - 128] = values[127 - i % 128] * (i / 128);
  }
}
#endif
