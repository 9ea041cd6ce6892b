// Exchanges within one warp.

#include "ptx.cuh"

using ptx::u32;
using ptx::u64;

// a, b: (32,), values and lane operands; d: (32, 2), the value and the predicate. c: clamp and segment mask.
#define SHUFFLE(mode)                                                                    \
  extern "C" __global__ void shuffle_##mode(const u32* a, const u32* b, u32 c, u32* d) { \
    const u32 lane = threadIdx.x;                                                        \
    u32 value, inside;                                                                   \
    asm volatile(                                                                        \
        "{\n.reg .pred p;\n"                                                             \
        "shfl.sync." #mode                                                               \
        ".b32 %0|p, %2, %3, %4, 0xffffffff;\n"                                           \
        "selp.u32 %1, 1, 0, p;\n}"                                                       \
        : "=r"(value), "=r"(inside)                                                      \
        : "r"(a[lane]), "r"(b[lane]), "r"(c));                                           \
    d[2 * lane] = value;                                                                 \
    d[2 * lane + 1] = inside;                                                            \
  }
SHUFFLE(idx)
SHUFFLE(up)
SHUFFLE(down)
SHUFFLE(bfly)

#define VOTE(mode, result, p, mask) \
  asm volatile(                     \
      "{\n.reg .pred p, q;\n"       \
      "setp.ne.u32 p, %1, 0;\n"     \
      "vote.sync." mode             \
      ".pred q, p, %2;\n"           \
      "selp.u32 %0, 1, 0, q;\n}"    \
      : "=r"(result)                \
      : "r"(p), "r"(mask))

// a: (32,); d: (32, 7). Lanes from `lanes` on take no part and keep what d has.
extern "C" __global__ void votes(const u32* a, u32 lanes, u32* d) {
  const u32 lane = threadIdx.x, mask = lanes == 32 ? 0xffffffff : (1u << lanes) - 1, value = a[lane];
  if (lane >= lanes) return;
  u32 r[7];
  VOTE("all", r[0], value, mask);
  VOTE("any", r[1], value, mask);
  VOTE("uni", r[2], value, mask);
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "vote.sync.ballot.b32 %0, p, %2;\n}"
      : "=r"(r[3])
      : "r"(value), "r"(mask));
  asm volatile("match.any.sync.b32 %0, %1, %2;" : "=r"(r[4]) : "r"(value), "r"(mask));
  asm volatile("match.any.sync.b64 %0, %1, %2;" : "=r"(r[5]) : "l"(static_cast<u64>(value) << 32 | 1), "r"(mask));
  asm volatile(
      "{\n.reg .pred p;\n"
      "match.all.sync.b32 %0|p, %1, %2;\n}"
      : "=r"(r[6])
      : "r"(value), "r"(mask));
  for (int i = 0; i < 7; ++i) d[7 * lane + i] = r[i];
}

// d: (32, 2), the active lanes in each of two diverged branches, then those of a loop's last pass.
extern "C" __global__ void active(u32* d) {
  const u32 lane = threadIdx.x;
  u32 mask, last = 0;
  if (lane % 3 == 0) {
    asm volatile("activemask.b32 %0;" : "=r"(mask));
  } else {
    asm volatile("activemask.b32 %0;" : "=r"(mask));
  }
  __syncwarp();
#pragma unroll 1
  for (u32 i = 0; i <= lane / 8; ++i) asm volatile("activemask.b32 %0;" : "=r"(last));
  d[2 * lane] = mask;
  d[2 * lane + 1] = last;
}

// a: (32,); d: (32, 9). Lanes outside `mask` take no part.
extern "C" __global__ void reduce(const u32* a, u32 mask, u32* d) {
  const u32 lane = threadIdx.x, value = a[lane];
  if (!(mask >> lane & 1)) return;
  u32 r[9];
#define REDUCE(i, op) asm volatile("redux.sync." op " %0, %1, %2;" : "=r"(r[i]) : "r"(value), "r"(mask))
  REDUCE(0, "add.u32");
  REDUCE(1, "add.s32");
  REDUCE(2, "min.u32");
  REDUCE(3, "max.u32");
  REDUCE(4, "min.s32");
  REDUCE(5, "max.s32");
  REDUCE(6, "and.b32");
  REDUCE(7, "or.b32");
  REDUCE(8, "xor.b32");
  for (int i = 0; i < 9; ++i) d[9 * lane + i] = r[i];
}

// a, d: (32,). Even and odd lanes write in branches of their own; the barrier makes each see the other's.
extern "C" __global__ void exchange(const u32* a, u32* d) {
  __shared__ u32 values[32];
  const u32 lane = threadIdx.x;
  if (lane % 2) {
    values[lane] = a[lane] + 1;
  } else {
    values[lane] = 3 * a[lane];
  }
  ptx::bar_warp_sync(0xffffffff);
  d[lane] = values[lane ^ 1];
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// d: (32, 2), the leader's lane and whether this is it. Lanes outside `mask` take no part.
extern "C" __global__ void elect(u32 mask, u32* d) {
  const u32 lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  u32 leader, elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync %0|p, %2;\n"
      "selp.u32 %1, 1, 0, p;\n}"
      : "=r"(leader), "=r"(elected)
      : "r"(mask));
  d[2 * lane] = leader;
  d[2 * lane + 1] = elected;
}
#endif
