// wgmma: D (64, N) (+)= A (64, 16) B (16, N) by a warpgroup, asynchronously; 16-bit types, float32 sums, sm_90a (PTX
// ISA 9.7.15). B lies in shared memory, [N, 16]; A there, [64, 16], or in registers.
//
// Warp w of the group holds rows 16 w ... 16 w + 15, as mma.sync's operands are laid out (9.7.15.5.1.1): a thread has
//   A  a[0], a[1] rows l / 4 and l / 4 + 8, word l % 4 of the first 8 elements;  a[2], a[3] of the next 8
//   D  d[4 j], d[4 j + 1] row l / 4, columns 8 j + l % 4 * 2 and the next;  d[4 j + 2], d[4 j + 3] of row l / 4 + 8
#pragma once

#include <cstdint>

namespace refinenet_fast::cuda::ptx {

// Orders registers that threads have written before the products that read them (9.7.15.7.1).
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last one become a group (9.7.15.7.2).
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all groups but the newest kPending are done (9.7.15.7.3).
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads of a sum to before this point.
__device__ __forceinline__ void keep(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }

// Of an operand in shared memory whose rows are 128 swizzled bytes, eight of them an atom of 1024 bytes, at a multiple
// of which it begins; 16 elements further along the rows are 32 bytes more (9.7.15.5.1.2.2).
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t start) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kAtom = 1024, kUnused = 1;
  return kSwizzle128 | (kAtom >> 4) << 32 | kUnused << 16 | (start & 0x3ffff) >> 4;
}

// wgmma.mma_async by N and type (9.7.15.5.2); `add`: to D, otherwise in its place.
template <int kColumns>
struct WgmmaBf16;
template <int kColumns>
struct WgmmaF16;

// Lists of operands: the registers of D by name, and their places.
#define REFINENET_FAST_D8(i)                                                                                  \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define REFINENET_FAST_D32(i) \
  REFINENET_FAST_D8(i), REFINENET_FAST_D8(i + 8), REFINENET_FAST_D8(i + 16), REFINENET_FAST_D8(i + 24)
#define REFINENET_FAST_D64(i) REFINENET_FAST_D32(i), REFINENET_FAST_D32(i + 32)
#define REFINENET_FAST_D128(i) REFINENET_FAST_D64(i), REFINENET_FAST_D64(i + 64)
#define REFINENET_FAST_PLACES32                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REFINENET_FAST_PLACES64                                                      \
  REFINENET_FAST_PLACES32                                                            \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REFINENET_FAST_PLACES128                                                                 \
  REFINENET_FAST_PLACES64                                                                        \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define REFINENET_FAST_WGMMA(NAME, N, SUMS, TYPE, P0, P1, P2, P3, P4, P5)                                             \
  template <>                                                                                                         \
  struct NAME<N> {                                                                                                    \
    static __device__ __forceinline__ void multiply(float (&d)[SUMS], uint64_t a, uint64_t b, bool add) {             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2                                                             \
                   ", 0;\n"                                                                                           \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REFINENET_FAST_PLACES##SUMS   \
                   "}, " P0 ", " P1 ", p, 1, 1, 0, 0;\n}"                                                             \
                   : REFINENET_FAST_D##SUMS(0)                                                                        \
                   : "l"(a), "l"(b), "r"(static_cast<uint32_t>(add))                                                  \
                   : "memory");                                                                                       \
    }                                                                                                                 \
    static __device__ __forceinline__ void multiply(float (&d)[SUMS], const uint32_t (&a)[4], uint64_t b, bool add) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5                                                             \
                   ", 0;\n"                                                                                           \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REFINENET_FAST_PLACES##SUMS   \
                   "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, 0;\n}"                                      \
                   : REFINENET_FAST_D##SUMS(0)                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(add))              \
                   : "memory");                                                                                       \
    }                                                                                                                 \
  };
REFINENET_FAST_WGMMA(WgmmaBf16, 64, 32, "bf16", "%32", "%33", "%34", "%35", "%36", "%37")
REFINENET_FAST_WGMMA(WgmmaBf16, 128, 64, "bf16", "%64", "%65", "%66", "%67", "%68", "%69")
REFINENET_FAST_WGMMA(WgmmaBf16, 256, 128, "bf16", "%128", "%129", "%130", "%131", "%132", "%133")
REFINENET_FAST_WGMMA(WgmmaF16, 64, 32, "f16", "%32", "%33", "%34", "%35", "%36", "%37")
REFINENET_FAST_WGMMA(WgmmaF16, 128, 64, "f16", "%64", "%65", "%66", "%67", "%68", "%69")
REFINENET_FAST_WGMMA(WgmmaF16, 256, 128, "f16", "%128", "%129", "%130", "%131", "%132", "%133")
#undef REFINENET_FAST_WGMMA
#undef REFINENET_FAST_D8
#undef REFINENET_FAST_D32
#undef REFINENET_FAST_D64
#undef REFINENET_FAST_D128
#undef REFINENET_FAST_PLACES32
#undef REFINENET_FAST_PLACES64
#undef REFINENET_FAST_PLACES128

}  // namespace refinenet_fast::cuda::ptx
