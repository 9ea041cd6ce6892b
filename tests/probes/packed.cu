// Arithmetic and conversions of one thread: every kernel takes three words a thread, x, y and z, and returns a row of
// words, one an instruction (two if it has 64 bits).

#include "ptx.cuh"

using ptx::u16;
using ptx::u32;
using ptx::u64;

// a, b, c: (threads,); d: (threads, results).
#define KERNEL(name, results, ...)                                                    \
  extern "C" __global__ void name(const u32* a, const u32* b, const u32* c, u32* d) { \
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;                              \
    [[maybe_unused]] const u32 x = a[i], y = b[i], z = c[i];                          \
    u32 r[results];                                                                   \
    u32 next = 0;                                                                     \
    __VA_ARGS__                                                                       \
    for (u32 j = 0; j < results; ++j) d[results * i + j] = r[j];                      \
  }
#define ONE(op, p) asm(op " %0, %1;" : "=r"(r[next++]) : "r"(p));
#define TWO(op, p, q) asm(op " %0, %1, %2;" : "=r"(r[next++]) : "r"(p), "r"(q));
#define THREE(op, p, q, s) asm(op " %0, %1, %2, %3;" : "=r"(r[next++]) : "r"(p), "r"(q), "r"(s));
#define FOUR(op, p, q, s, t) asm(op " %0, %1, %2, %3, %4;" : "=r"(r[next++]) : "r"(p), "r"(q), "r"(s), "r"(t));
// 64 bits, low word first.
#define WIDE(op, inputs, ...)                              \
  {                                                        \
    u64 wide;                                              \
    asm(op " %0, " inputs ";" : "=l"(wide) : __VA_ARGS__); \
    r[next++] = static_cast<u32>(wide);                    \
    r[next++] = static_cast<u32>(wide >> 32);              \
  }
#define FROM_HALF(op, p) asm(op " %0, %1;" : "=r"(r[next++]) : "h"(static_cast<u16>(p)));
#define TO_HALF(op, p)                        \
  {                                           \
    u16 half;                                 \
    asm(op " %0, %1;" : "=h"(half) : "r"(p)); \
    r[next++] = half;                         \
  }

KERNEL(f16x2, 8,
       TWO("add.f16x2", x, y) TWO("sub.f16x2", x, y) TWO("mul.f16x2", x, y) THREE("fma.rn.f16x2", x, y, z)
           TWO("max.f16x2", x, y) TWO("min.f16x2", x, y) TWO("max.NaN.f16x2", x, y) TWO("min.NaN.f16x2", x, y))

KERNEL(bf16x2, 5,
       THREE("fma.rn.bf16x2", x, y, z) TWO("max.bf16x2", x, y) TWO("min.bf16x2", x, y) TWO("max.NaN.bf16x2", x, y)
           TWO("min.NaN.bf16x2", x, y))

KERNEL(signs, 4, ONE("neg.f16x2", x) ONE("abs.f16x2", x) ONE("neg.bf16x2", x) ONE("abs.bf16x2", x))

KERNEL(clamped, 6,
       TWO("cvt.rn.relu.bf16x2.f32", x, y) TWO("cvt.rn.relu.f16x2.f32", x, y) TO_HALF("cvt.rn.relu.bf16.f32", x)
           THREE("fma.rn.sat.f32", x, y, z) TWO("add.rn.sat.f32", x, y) TWO("mul.rz.sat.f32", x, z))

KERNEL(to_half, 8,
       TWO("cvt.rn.bf16x2.f32", x, y) TWO("cvt.rz.bf16x2.f32", x, y) TWO("cvt.rn.f16x2.f32", x, y)
           TWO("cvt.rz.f16x2.f32", x, y) TO_HALF("cvt.rn.bf16.f32", x) TO_HALF("cvt.rn.f16.f32", x)
               TO_HALF("cvt.rz.f16.f32", x)
       // The low bits of a tf32 are not specified.
       ONE("cvt.rna.tf32.f32", x) r[next - 1] &= 0xffffe000;)

KERNEL(from_half, 5,
       FROM_HALF("cvt.f32.f16", x) FROM_HALF("cvt.f32.f16", x >> 16) FROM_HALF("cvt.rni.s32.f16", x)
           FROM_HALF("cvt.rzi.u32.f16", x) FROM_HALF("cvt.rmi.s32.f16", x))

KERNEL(float_to_int, 14,
       ONE("cvt.rni.s32.f32", x) ONE("cvt.rzi.s32.f32", x) ONE("cvt.rmi.s32.f32", x) ONE("cvt.rpi.s32.f32", x)
           ONE("cvt.rni.u32.f32", x) ONE("cvt.rzi.u32.f32", x) ONE("cvt.rni.sat.s8.f32", x) ONE("cvt.rni.sat.u8.f32", x)
               ONE("cvt.rni.f32.f32", x) ONE("cvt.rzi.f32.f32", x) ONE("cvt.rmi.f32.f32", x) ONE("cvt.rpi.f32.f32", x)
                   WIDE("cvt.rzi.s64.f32", "%1", "r"(x)))

KERNEL(int_to_any, 15,
       ONE("cvt.rn.f32.s32", x) ONE("cvt.rz.f32.s32", x) ONE("cvt.rn.f32.u32", x) ONE("cvt.rz.f32.u32", x)
           ONE("cvt.rp.f32.u32", x) ONE("cvt.rm.f32.s32", x) ONE("cvt.sat.s8.s32", x) ONE("cvt.sat.u8.s32", x)
               ONE("cvt.s8.s32", x) ONE("cvt.u8.u32", x) ONE("cvt.sat.u16.s32", x) ONE("cvt.sat.s16.u32", x)
                   TO_HALF("cvt.rn.f16.s32", x) TO_HALF("cvt.rz.f16.u32", y) ONE("cvt.rn.f32.s8", y))

KERNEL(floats, 20,
       TWO("add.rn.f32", x, y) TWO("add.rz.f32", x, y) TWO("add.rm.f32", x, y) TWO("add.rp.f32", x, y)
           TWO("sub.rn.f32", x, y) TWO("mul.rn.f32", x, y) TWO("mul.rz.f32", x, y) TWO("mul.rp.f32", x, y)
               THREE("fma.rn.f32", x, y, z) THREE("fma.rz.f32", x, y, z) THREE("fma.rm.f32", x, y, z)
                   TWO("div.rn.f32", x, y) ONE("rcp.rn.f32", x) ONE("sqrt.rn.f32", y) TWO("max.f32", x, y)
                       TWO("min.f32", x, y) TWO("max.NaN.f32", x, y) TWO("min.NaN.f32", x, y)
                           TWO("add.rn.ftz.f32", x, y) TWO("mul.rn.ftz.f32", x, y))

#define SELECT(compare, p, q) \
  asm("{\n.reg .pred t;\nsetp." compare " t, %1, %2;\nselp.b32 %0, 1, 0, t;\n}" : "=r"(r[next++]) : "r"(p), "r"(q));
KERNEL(compares, 27,
       SELECT("eq.f32", x, y) SELECT("ne.f32", x, y) SELECT("lt.f32", x, y) SELECT("le.f32", x, y)
           SELECT("gt.f32", x, y) SELECT("ge.f32", x, y) SELECT("equ.f32", x, y) SELECT("neu.f32", x, y)
               SELECT("ltu.f32", x, y) SELECT("leu.f32", x, y) SELECT("gtu.f32", x, y) SELECT("geu.f32", x, y)
                   SELECT("num.f32", x, y) SELECT("nan.f32", x, y) SELECT("lt.s32", x, y) SELECT("lt.u32", x, y)
                       SELECT("lo.u32", x, y) SELECT("ls.u32", x, y) SELECT("hi.u32", x, y) SELECT("hs.u32", x, y)
                           TWO("set.lt.u32.f32", x, y) TWO("set.ge.f32.s32", x, y) TWO("set.gtu.u32.f32", x, y)
                               THREE("slct.u32.s32", x, y,
                                     z) asm("slct.u32.f32 %0, %1, %2, %3;" : "=r"(r[next++]) : "r"(x), "r"(y),
                                            "f"(__uint_as_float(z)));
       asm("{\n.reg .pred s, t;\nsetp.lt.s32 t, %1, 0;\nsetp.gt.and.s32 s|t, %1, %2, t;\n"
           "selp.b32 %0, 1, 0, s;\n@t add.u32 %0, %0, 2;\n}" : "=r"(r[next++]) : "r"(x),
           "r"(y));
       asm("{\n.reg .pred s, t;\nsetp.lt.s32 t, %1, 0;\nsetp.lt.s32 s, %2, 0;\nxor.pred s, s, t;\nnot.pred t, s;\n"
           "selp.b32 %0, 5, 6, t;\n}" : "=r"(r[next++]) : "r"(x),
           "r"(y));)

KERNEL(bits, 26,
       THREE("prmt.b32", x, y, z) THREE("prmt.b32.f4e", x, y, z) THREE("prmt.b32.b4e", x, y, z)
           THREE("prmt.b32.rc8", x, y, z) THREE("prmt.b32.ecl", x, y, z) THREE("prmt.b32.ecr", x, y, z)
               THREE("prmt.b32.rc16", x, y, z) THREE("bfe.u32", x, y, z) THREE("bfe.s32", x, y, z)
                   FOUR("bfi.b32", x, y, z, z >> 8) asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(r[next++]) : "r"(x),
                                                        "r"(y), "r"(z));
       asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r[next++]) : "r"(x), "r"(y), "r"(z));
       asm("lop3.b32 %0, %1, %2, %3, 0x1d;" : "=r"(r[next++]) : "r"(x), "r"(y), "r"(z));
       THREE("shf.l.wrap.b32", x, y, z) THREE("shf.l.clamp.b32", x, y, z) THREE("shf.r.wrap.b32", x, y, z)
           THREE("shf.r.clamp.b32", x, y, z) TWO("shl.b32", x, z & 63) TWO("shr.u32", x, z & 63)
               TWO("shr.s32", x, z & 63) ONE("popc.b32", x) ONE("clz.b32", x) ONE("brev.b32", x) ONE("bfind.u32", x)
                   ONE("bfind.s32", x) ONE("bfind.shiftamt.u32", x))

KERNEL(integers, 31,
       TWO("mul.lo.u32", x, y) TWO("mul.hi.u32", x, y) TWO("mul.hi.s32", x, y) THREE("mad.lo.s32", x, y, z)
           THREE("mad.hi.u32", x, y, z) TWO("mul24.lo.u32", x, y) TWO("mul24.lo.s32", x, y)
               THREE("mad24.lo.s32", x, y, z) THREE("dp4a.s32.s32", x, y, z) THREE("dp4a.u32.u32", x, y, z)
                   THREE("dp4a.u32.s32", x, y, z) TWO("min.s32", x, y) TWO("max.s32", x, y) TWO("min.u32", x, y)
                       TWO("max.u32", x, y) THREE("sad.u32", x, y, z) THREE("sad.s32", x, y, z) ONE("neg.s32", x)
                           ONE("abs.s32", y) ONE("cnot.b32", x & 1) TWO("div.u32", x, y | 1) TWO("rem.u32", x, y | 1)
                               TWO("div.s32", x, z | 1) TWO("rem.s32", x, z | 1) TWO("add.sat.s32", x, y)
                                   TWO("sub.sat.s32", x, y) ONE("not.b32", x)
                                       WIDE("mul.wide.u32", "%1, %2", "r"(x), "r"(y))
                                           WIDE("mul.wide.s32", "%1, %2", "r"(x), "r"(y)))

// 64-bit operands p = y:x and q = z:y.
KERNEL(wide, 33, const u64 p = static_cast<u64>(y) << 32 | x; const u64 q = static_cast<u64>(z) << 32 | y;
       WIDE("add.s64", "%1, %2", "l"(p), "l"(q)) WIDE("sub.s64", "%1, %2", "l"(p), "l"(q))
           WIDE("mul.lo.u64", "%1, %2", "l"(p), "l"(q)) WIDE("mul.hi.u64", "%1, %2", "l"(p), "l"(q))
               WIDE("mul.hi.s64", "%1, %2", "l"(p), "l"(q)) WIDE("mad.wide.u32", "%1, %2, %3", "r"(x), "r"(z), "l"(q))
                   WIDE("mad.wide.s32", "%1, %2, %3", "r"(x), "r"(z), "l"(q))
                       WIDE("shl.b64", "%1, %2", "l"(p), "r"(z & 127)) WIDE("shr.u64", "%1, %2", "l"(p), "r"(z & 127))
                           WIDE("shr.s64", "%1, %2", "l"(p), "r"(z & 127)) WIDE("min.s64", "%1, %2", "l"(p), "l"(q))
                               WIDE("max.u64", "%1, %2", "l"(p), "l"(q)) WIDE("brev.b64", "%1", "l"(p))
                                   WIDE("xor.b64", "%1, %2", "l"(p),
                                        "l"(q)) asm("popc.b64 %0, %1;" : "=r"(r[next++]) : "l"(p));
       asm("clz.b64 %0, %1;" : "=r"(r[next++]) : "l"(p >> (z & 63)));
       asm("{\n.reg .b32 low, high;\nadd.cc.u32 low, %1, %2;\naddc.u32 high, %2, %3;\nxor.b32 %0, low, high;\n}" : "=r"(
               r[next++]) : "r"(x),
           "r"(y), "r"(z));
       asm("{\n.reg .b32 low, high;\nsub.cc.u32 low, %1, %2;\nsubc.u32 high, %2, %3;\nxor.b32 %0, low, high;\n}" : "=r"(
               r[next++]) : "r"(x),
           "r"(y), "r"(z));
       asm("{\n.reg .b32 low, high;\nmov.b64 {low, high}, %1;\nsub.u32 %0, high, low;\n}" : "=r"(r[next++]) : "l"(p));)

KERNEL(approximate, 6,
       ONE("ex2.approx.f32", x) ONE("ex2.approx.ftz.f32", y) ONE("lg2.approx.f32", x) ONE("rcp.approx.ftz.f32", y)
           ONE("rsqrt.approx.f32", x) ONE("sqrt.approx.f32", y))

KERNEL(coarse, 4, ONE("tanh.approx.f32", x) ONE("sin.approx.f32", x) ONE("cos.approx.f32", y) TWO("div.full.f32", x, y))

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
KERNEL(bf16x2_arithmetic, 3, TWO("add.rn.bf16x2", x, y) TWO("sub.rn.bf16x2", x, y) TWO("mul.rn.bf16x2", x, y))

KERNEL(from_bf16, 2, FROM_HALF("cvt.f32.bf16", x) FROM_HALF("cvt.f32.bf16", x >> 16))
#endif
