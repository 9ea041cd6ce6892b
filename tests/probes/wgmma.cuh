// wgmma (sm_90a), in the manner of ptx.cuh: a warpgroup multiplies matrices in shared memory or registers (PTX ISA 8.x,
// chapter 9.7.15).

#pragma once

#include "ptx.cuh"

namespace ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving reads or writes of a register being accumulated into across this point.
__device__ __forceinline__ void keep(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void keep(u32& x) { asm volatile("" : "+r"(x)::"memory"); }

// Descriptor of an operand in shared memory: its start and the leading and stride byte offsets, multiples of 16 below
// 2^18; swizzle: 0, 32, 64 or 128 bytes.
__host__ __device__ __forceinline__ u64 wgmma_descriptor(u32 start, u32 leading, u32 stride, u32 swizzle) {
  const u64 mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return static_cast<u64>((start & 0x3FFFF) >> 4) | static_cast<u64>((leading & 0x3FFFF) >> 4) << 16 |
         static_cast<u64>((stride & 0x3FFFF) >> 4) << 32 | mode << 62;
}

// wgmma.mma_async: D (64, n) = scale_a A (64, k) scale_b B (k, n) + (scale_d ? D : 0). Specialised below for the n in
// use; `ss` takes A from shared memory, `rs` from registers. trans_a, trans_b: 1 if the operand in shared memory is
// contiguous along m or n rather than k.
template <int n>
struct WgmmaBf16;  // k = 16, float32 accumulators
template <int n>
struct WgmmaF16;  // k = 16, float32 accumulators
template <int n>
struct WgmmaF16F16;  // k = 16, accumulators of two halves a register
template <int n>
struct WgmmaTf32;  // k = 8, float32 accumulators

#define PTX_D4 "%0, %1, %2, %3"
#define PTX_D2 "%0, %1"
#define PTX_D8 \
  PTX_D4       \
  ", "         \
  "%4, %5, %6, %7"
#define PTX_D16 \
  PTX_D8        \
  ", "          \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define PTX_D24 \
  PTX_D16       \
  ", "          \
  "%16, %17, %18, %19, %20, %21, %22, %23"
#define PTX_D32 \
  PTX_D16       \
  ", "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PTX_D48 \
  PTX_D32       \
  ", "          \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PTX_D64 \
  PTX_D48       \
  ", "          \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PTX_D96                                                                                                    \
  PTX_D64                                                                                                          \
  ", "                                                                                                             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PTX_D128                                                                                                   \
  PTX_D96                                                                                                          \
  ", "                                                                                                             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// Operands after as many registers.
#define PTX_AFTER_2 "%2", "%3", "%4", "%5", "%6", "%7", "%8", "%9", "%10"
#define PTX_AFTER_4 "%4", "%5", "%6", "%7", "%8", "%9", "%10", "%11", "%12"
#define PTX_AFTER_8 "%8", "%9", "%10", "%11", "%12", "%13", "%14", "%15", "%16"
#define PTX_AFTER_16 "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%23", "%24"
#define PTX_AFTER_24 "%24", "%25", "%26", "%27", "%28", "%29", "%30", "%31", "%32"
#define PTX_AFTER_32 "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%39", "%40"
#define PTX_AFTER_48 "%48", "%49", "%50", "%51", "%52", "%53", "%54", "%55", "%56"
#define PTX_AFTER_64 "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%71", "%72"
#define PTX_AFTER_96 "%96", "%97", "%98", "%99", "%100", "%101", "%102", "%103", "%104"
#define PTX_AFTER_128 "%128", "%129", "%130", "%131", "%132", "%133", "%134", "%135", "%136"
#define PTX_IO2(c, i) c(d[i]), c(d[i + 1])
#define PTX_IO4(c, i) PTX_IO2(c, i), PTX_IO2(c, i + 2)
#define PTX_IO8(c, i) PTX_IO4(c, i), PTX_IO4(c, i + 4)
#define PTX_IO16(c, i) PTX_IO8(c, i), PTX_IO8(c, i + 8)
#define PTX_IO24(c, i) PTX_IO16(c, i), PTX_IO8(c, i + 16)
#define PTX_IO32(c, i) PTX_IO16(c, i), PTX_IO16(c, i + 16)
#define PTX_IO48(c, i) PTX_IO32(c, i), PTX_IO16(c, i + 32)
#define PTX_IO64(c, i) PTX_IO32(c, i), PTX_IO32(c, i + 32)
#define PTX_IO96(c, i) PTX_IO64(c, i), PTX_IO32(c, i + 64)
#define PTX_IO128(c, i) PTX_IO64(c, i), PTX_IO64(c, i + 64)

#define PTX_WGMMA_16(Name, n, types, count, word, c, i0, i1, i2, i3, i4, i5, i6, i7, i8)                           \
  template <>                                                                                                      \
  struct Name<n> {                                                                                                 \
    static constexpr int registers = count;                                                                        \
    template <int trans_a = 0, int trans_b = 0, int scale_a = 1, int scale_b = 1>                                  \
    static __device__ __forceinline__ void ss(word (&d)[count], u64 a, u64 b, u32 scale_d) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i2                                                          \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16." types " {" PTX_D##count                           \
                   "}, " i0 ", " i1 ", p, " i3 ", " i4 ", " i5 ", " i6 ";\n}"                                      \
                   : PTX_IO##count(c, 0)                                                                           \
                   : "l"(a), "l"(b), "r"(scale_d), "n"(scale_a), "n"(scale_b), "n"(trans_a), "n"(trans_b)          \
                   : "memory");                                                                                    \
    }                                                                                                              \
    template <int trans_b = 0, int scale_a = 1, int scale_b = 1>                                                   \
    static __device__ __forceinline__ void rs(word (&d)[count], const u32 (&a)[4], u64 b, u32 scale_d) {           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i5                                                          \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16." types " {" PTX_D##count                           \
                   "}, {" i0 ", " i1 ", " i2 ", " i3 "}, " i4 ", p, " i6 ", " i7 ", " i8 ";\n}"                    \
                   : PTX_IO##count(c, 0)                                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(scale_a), "n"(scale_b), \
                     "n"(trans_b)                                                                                  \
                   : "memory");                                                                                    \
    }                                                                                                              \
  };
// tf32 operands are always contiguous along k.
#define PTX_WGMMA_8(Name, n, types, count, word, c, i0, i1, i2, i3, i4, i5, i6, i7, i8)                             \
  template <>                                                                                                       \
  struct Name<n> {                                                                                                  \
    static constexpr int registers = count;                                                                         \
    template <int scale_a = 1, int scale_b = 1>                                                                     \
    static __device__ __forceinline__ void ss(word (&d)[count], u64 a, u64 b, u32 scale_d) {                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i2                                                           \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k8." types " {" PTX_D##count "}, " i0 ", " i1 ", p, " i3 \
                                                                                        ", " i4 ";\n}"              \
                   : PTX_IO##count(c, 0)                                                                            \
                   : "l"(a), "l"(b), "r"(scale_d), "n"(scale_a), "n"(scale_b)                                       \
                   : "memory");                                                                                     \
    }                                                                                                               \
    template <int scale_a = 1, int scale_b = 1>                                                                     \
    static __device__ __forceinline__ void rs(word (&d)[count], const u32 (&a)[4], u64 b, u32 scale_d) {            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i5                                                           \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k8." types " {" PTX_D##count                             \
                   "}, {" i0 ", " i1 ", " i2 ", " i3 "}, " i4 ", p, " i6 ", " i7 ";\n}"                             \
                   : PTX_IO##count(c, 0)                                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(scale_a), "n"(scale_b)   \
                   : "memory");                                                                                     \
    }                                                                                                               \
  };
#define PTX_WGMMA(k, ...) PTX_WGMMA_##k(__VA_ARGS__)
PTX_WGMMA(16, WgmmaBf16, 8, "f32.bf16.bf16", 4, float, "+f", PTX_AFTER_4)
PTX_WGMMA(16, WgmmaBf16, 16, "f32.bf16.bf16", 8, float, "+f", PTX_AFTER_8)
PTX_WGMMA(16, WgmmaBf16, 32, "f32.bf16.bf16", 16, float, "+f", PTX_AFTER_16)
PTX_WGMMA(16, WgmmaBf16, 64, "f32.bf16.bf16", 32, float, "+f", PTX_AFTER_32)
PTX_WGMMA(16, WgmmaBf16, 96, "f32.bf16.bf16", 48, float, "+f", PTX_AFTER_48)
PTX_WGMMA(16, WgmmaBf16, 128, "f32.bf16.bf16", 64, float, "+f", PTX_AFTER_64)
PTX_WGMMA(16, WgmmaBf16, 192, "f32.bf16.bf16", 96, float, "+f", PTX_AFTER_96)
PTX_WGMMA(16, WgmmaBf16, 256, "f32.bf16.bf16", 128, float, "+f", PTX_AFTER_128)
PTX_WGMMA(16, WgmmaF16, 8, "f32.f16.f16", 4, float, "+f", PTX_AFTER_4)
PTX_WGMMA(16, WgmmaF16, 16, "f32.f16.f16", 8, float, "+f", PTX_AFTER_8)
PTX_WGMMA(16, WgmmaF16, 32, "f32.f16.f16", 16, float, "+f", PTX_AFTER_16)
PTX_WGMMA(16, WgmmaF16, 64, "f32.f16.f16", 32, float, "+f", PTX_AFTER_32)
PTX_WGMMA(16, WgmmaF16, 96, "f32.f16.f16", 48, float, "+f", PTX_AFTER_48)
PTX_WGMMA(16, WgmmaF16, 128, "f32.f16.f16", 64, float, "+f", PTX_AFTER_64)
PTX_WGMMA(16, WgmmaF16, 192, "f32.f16.f16", 96, float, "+f", PTX_AFTER_96)
PTX_WGMMA(16, WgmmaF16, 256, "f32.f16.f16", 128, float, "+f", PTX_AFTER_128)
PTX_WGMMA(16, WgmmaF16F16, 8, "f16.f16.f16", 2, u32, "+r", PTX_AFTER_2)
PTX_WGMMA(16, WgmmaF16F16, 16, "f16.f16.f16", 4, u32, "+r", PTX_AFTER_4)
PTX_WGMMA(16, WgmmaF16F16, 32, "f16.f16.f16", 8, u32, "+r", PTX_AFTER_8)
PTX_WGMMA(16, WgmmaF16F16, 64, "f16.f16.f16", 16, u32, "+r", PTX_AFTER_16)
PTX_WGMMA(16, WgmmaF16F16, 96, "f16.f16.f16", 24, u32, "+r", PTX_AFTER_24)
PTX_WGMMA(16, WgmmaF16F16, 128, "f16.f16.f16", 32, u32, "+r", PTX_AFTER_32)
PTX_WGMMA(16, WgmmaF16F16, 192, "f16.f16.f16", 48, u32, "+r", PTX_AFTER_48)
PTX_WGMMA(16, WgmmaF16F16, 256, "f16.f16.f16", 64, u32, "+r", PTX_AFTER_64)
PTX_WGMMA(8, WgmmaTf32, 8, "f32.tf32.tf32", 4, float, "+f", PTX_AFTER_4)
PTX_WGMMA(8, WgmmaTf32, 16, "f32.tf32.tf32", 8, float, "+f", PTX_AFTER_8)
PTX_WGMMA(8, WgmmaTf32, 32, "f32.tf32.tf32", 16, float, "+f", PTX_AFTER_16)
PTX_WGMMA(8, WgmmaTf32, 64, "f32.tf32.tf32", 32, float, "+f", PTX_AFTER_32)
PTX_WGMMA(8, WgmmaTf32, 96, "f32.tf32.tf32", 48, float, "+f", PTX_AFTER_48)
PTX_WGMMA(8, WgmmaTf32, 128, "f32.tf32.tf32", 64, float, "+f", PTX_AFTER_64)
PTX_WGMMA(8, WgmmaTf32, 192, "f32.tf32.tf32", 96, float, "+f", PTX_AFTER_96)
PTX_WGMMA(8, WgmmaTf32, 256, "f32.tf32.tf32", 128, float, "+f", PTX_AFTER_128)
#undef PTX_WGMMA
#undef PTX_WGMMA_8
#undef PTX_WGMMA_16
#undef PTX_D2
#undef PTX_AFTER_2
#undef PTX_IO2
#undef PTX_D4
#undef PTX_AFTER_4
#undef PTX_IO4
#undef PTX_D8
#undef PTX_AFTER_8
#undef PTX_IO8
#undef PTX_D16
#undef PTX_AFTER_16
#undef PTX_IO16
#undef PTX_D24
#undef PTX_AFTER_24
#undef PTX_IO24
#undef PTX_D32
#undef PTX_AFTER_32
#undef PTX_IO32
#undef PTX_D48
#undef PTX_AFTER_48
#undef PTX_IO48
#undef PTX_D64
#undef PTX_AFTER_64
#undef PTX_IO64
#undef PTX_D96
#undef PTX_AFTER_96
#undef PTX_IO96
#undef PTX_D128
#undef PTX_AFTER_128
#undef PTX_IO128

}  // namespace ptx
