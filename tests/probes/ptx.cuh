// One PTX instruction per function, operands as raw registers (PTX ISA 8.x, chapter 9.7). Shared memory is addressed by
// the 32-bit addresses that `shared_address` makes. What needs sm_90 or sm_90a says so where its section begins;
// wgmma has a header of its own.

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ u32 lane_id() {
  u32 lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// ---- mma.sync: D (16, 8) = A (16, k) B (k, 8) + C, a warp at a time ------------------------------------------------

#define PTX_MMA_F32_A4(name, shape, type)                                                                             \
  __device__ __forceinline__ void name(float (&d)[4], const u32(&a)[4], const u32(&b)[2], const float (&c)[4]) {      \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                              \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                           \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                   "f"(c[3]));                                                                                        \
  }
#define PTX_MMA_F32_A2(name, shape, type)                                                                        \
  __device__ __forceinline__ void name(float (&d)[4], const u32(&a)[2], const u32(&b)[1], const float (&c)[4]) { \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                         \
                 ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"                                     \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));                 \
  }
PTX_MMA_F32_A4(mma_m16n8k16_f16, "m16n8k16", "f16")
PTX_MMA_F32_A4(mma_m16n8k16_bf16, "m16n8k16", "bf16")
PTX_MMA_F32_A4(mma_m16n8k8_tf32, "m16n8k8", "tf32")
PTX_MMA_F32_A2(mma_m16n8k8_f16, "m16n8k8", "f16")
PTX_MMA_F32_A2(mma_m16n8k8_bf16, "m16n8k8", "bf16")
PTX_MMA_F32_A2(mma_m16n8k4_tf32, "m16n8k4", "tf32")
#undef PTX_MMA_F32_A4
#undef PTX_MMA_F32_A2

// Accumulators of two halves a register.
__device__ __forceinline__ void mma_m16n8k16_f16_f16(u32 (&d)[2], const u32 (&a)[4], const u32 (&b)[2],
                                                     const u32 (&c)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %9};"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]));
}

// ---- ldmatrix, stmatrix (sm_90), movmatrix: 8x8 matrices of 16-bit elements ----------------------------------------

#define PTX_LDMATRIX(suffix, modifier)                                                                             \
  __device__ __forceinline__ void ldmatrix_x1##suffix(u32(&d)[1], u32 address) {                                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" modifier ".shared.b16 {%0}, [%1];"                                \
                 : "=r"(d[0])                                                                                      \
                 : "r"(address)                                                                                    \
                 : "memory");                                                                                      \
  }                                                                                                                \
  __device__ __forceinline__ void ldmatrix_x2##suffix(u32(&d)[2], u32 address) {                                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0, %1}, [%2];"                            \
                 : "=r"(d[0]), "=r"(d[1])                                                                          \
                 : "r"(address)                                                                                    \
                 : "memory");                                                                                      \
  }                                                                                                                \
  __device__ __forceinline__ void ldmatrix_x4##suffix(u32(&d)[4], u32 address) {                                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0, %1, %2, %3}, [%4];"                    \
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                  \
                 : "r"(address)                                                                                    \
                 : "memory");                                                                                      \
  }                                                                                                                \
  __device__ __forceinline__ void stmatrix_x1##suffix(u32 address, const u32(&d)[1]) {                             \
    asm volatile("stmatrix.sync.aligned.m8n8.x1" modifier ".shared.b16 [%0], {%1};" ::"r"(address), "r"(d[0])      \
                 : "memory");                                                                                      \
  }                                                                                                                \
  __device__ __forceinline__ void stmatrix_x2##suffix(u32 address, const u32(&d)[2]) {                             \
    asm volatile("stmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(d[0]), \
                 "r"(d[1])                                                                                         \
                 : "memory");                                                                                      \
  }                                                                                                                \
  __device__ __forceinline__ void stmatrix_x4##suffix(u32 address, const u32(&d)[4]) {                             \
    asm volatile("stmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),    \
                 "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])                                                        \
                 : "memory");                                                                                      \
  }
PTX_LDMATRIX(, "")
PTX_LDMATRIX(_trans, ".trans")
#undef PTX_LDMATRIX

__device__ __forceinline__ u32 movmatrix_trans(u32 a) {
  u32 d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// ---- cp.async: `size` bytes, of which `given` are read and the rest is zero ----------------------------------------

template <int size>
__device__ __forceinline__ void cp_async_ca(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(size) : "memory");
}
template <int size>
__device__ __forceinline__ void cp_async_ca(u32 to, const void* from, u32 given) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(size), "r"(given) : "memory");
}
__device__ __forceinline__ void cp_async_cg(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void cp_async_cg(u32 to, const void* from, u32 given) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(given) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Without .noinc the pending count goes up by one first, so that the arrival is not among those expected.
__device__ __forceinline__ void cp_async_mbarrier_arrive(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void cp_async_mbarrier_arrive_noinc(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---- Barriers of the block -----------------------------------------------------------------------------------------

__device__ __forceinline__ void bar_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_warp_sync(u32 mask) { asm volatile("bar.warp.sync %0;" ::"r"(mask) : "memory"); }

// ---- Fences --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void fence_acq_rel_cta() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }
__device__ __forceinline__ void fence_acq_rel_cluster() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }
__device__ __forceinline__ void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// ---- mbarrier (sm_80; transaction counts, try_wait: sm_90) ---------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_inval(u32 barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ u64 mbarrier_arrive(u32 barrier) {
  u64 state;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(barrier) : "memory");
  return state;
}
__device__ __forceinline__ u64 mbarrier_arrive(u32 barrier, u32 count) {
  u64 state;
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 %0, [%1], %2;"
               : "=l"(state)
               : "r"(barrier), "r"(count)
               : "memory");
  return state;
}
__device__ __forceinline__ u64 mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
  u64 state;
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 %0, [%1], %2;"
               : "=l"(state)
               : "r"(barrier), "r"(bytes)
               : "memory");
  return state;
}
__device__ __forceinline__ void mbarrier_expect_tx(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_complete_tx(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// `barrier`: an address of the cluster's window, of this block's shared memory or (mapa) of another's.
__device__ __forceinline__ void mbarrier_arrive_cluster(u32 barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_cluster(u32 barrier, u32 count) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier), "r"(count)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx_cluster(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ bool mbarrier_test_wait(u32 barrier, u64 state) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "l"(state)
      : "memory");
  return done;
}
__device__ __forceinline__ bool mbarrier_test_wait_parity(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
__device__ __forceinline__ bool mbarrier_try_wait(u32 barrier, u64 state) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "l"(state)
      : "memory");
  return done;
}
__device__ __forceinline__ bool mbarrier_try_wait_parity(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
__device__ __forceinline__ bool mbarrier_try_wait_parity_cluster(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
// Returns once the phase of this parity is over.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
  while (!mbarrier_try_wait_parity(barrier, parity)) {
  }
}
__device__ __forceinline__ void mbarrier_wait_cluster(u32 barrier, u32 parity) {
  while (!mbarrier_try_wait_parity_cluster(barrier, parity)) {
  }
}
// The same with the loop in PTX, as CUTLASS and many kernels spell it.
__device__ __forceinline__ void mbarrier_wait_loop(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- Bulk copies (sm_90): multiples of 16 bytes, 16-byte aligned ---------------------------------------------------

__device__ __forceinline__ void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void bulk_load_multicast(u32 to, const void* from, u32 bytes, u32 barrier, u16 blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(blocks)
      : "memory");
}
// From this block's shared memory to another's, whose barrier counts the bytes.
__device__ __forceinline__ void bulk_copy_cluster(u32 to, u32 from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, u32 from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_add_f32(void* to, u32 from, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}
// Only until the sources have been read.
template <int pending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// ---- Bulk tensor copies (sm_90): coordinate x of the innermost dimension first -------------------------------------

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

#define PTX_X1 int x
#define PTX_X2 PTX_X1, int y
#define PTX_X3 PTX_X2, int z
#define PTX_X4 PTX_X3, int w
#define PTX_X5 PTX_X4, int v
#define PTX_R1 "r"(x)
#define PTX_R2 PTX_R1, "r"(y)
#define PTX_R3 PTX_R2, "r"(z)
#define PTX_R4 PTX_R3, "r"(w)
#define PTX_R5 PTX_R4, "r"(v)
// Lists of operands: a load's coordinates, a multicast's (`blocks` is %3), a store's.
#define PTX_TENSOR(rank, parameters, inputs, load, multicast, store)                                                 \
  __device__ __forceinline__ void tma_load_##rank(u32 to, const CUtensorMap* map, u32 barrier, parameters) {         \
    asm volatile("cp.async.bulk.tensor." #rank                                                                       \
                 ".shared::cluster.global.tile.mbarrier::complete_tx::bytes "                                        \
                 "[%0], [%1, {" load "}], [%2];" ::"r"(to),                                                          \
                 "l"(map), "r"(barrier), inputs                                                                      \
                 : "memory");                                                                                        \
  }                                                                                                                  \
  __device__ __forceinline__ void tma_load_multicast_##rank(u32 to, const CUtensorMap* map, u32 barrier, u16 blocks, \
                                                            parameters) {                                            \
    asm volatile("cp.async.bulk.tensor." #rank                                                                       \
                 ".shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "                     \
                 "[%0], [%1, {" multicast "}], [%2], %3;" ::"r"(to),                                                 \
                 "l"(map), "r"(barrier), "h"(blocks), inputs                                                         \
                 : "memory");                                                                                        \
  }                                                                                                                  \
  __device__ __forceinline__ void tma_store_##rank(const CUtensorMap* map, u32 from, parameters) {                   \
    asm volatile("cp.async.bulk.tensor." #rank ".global.shared::cta.tile.bulk_group [%0, {" store                    \
                 "}], [%1];" ::"l"(map),                                                                             \
                 "r"(from), inputs                                                                                   \
                 : "memory");                                                                                        \
  }
#define PTX_LIST(...) __VA_ARGS__
PTX_TENSOR(1d, PTX_X1, PTX_LIST(PTX_R1), "%3", "%4", "%2")
PTX_TENSOR(2d, PTX_LIST(PTX_X2), PTX_LIST(PTX_R2), "%3, %4", "%4, %5", "%2, %3")
PTX_TENSOR(3d, PTX_LIST(PTX_X3), PTX_LIST(PTX_R3), "%3, %4, %5", "%4, %5, %6", "%2, %3, %4")
PTX_TENSOR(4d, PTX_LIST(PTX_X4), PTX_LIST(PTX_R4), "%3, %4, %5, %6", "%4, %5, %6, %7", "%2, %3, %4, %5")
PTX_TENSOR(5d, PTX_LIST(PTX_X5), PTX_LIST(PTX_R5), "%3, %4, %5, %6, %7", "%4, %5, %6, %7, %8", "%2, %3, %4, %5, %6")
#undef PTX_TENSOR
#undef PTX_LIST
#undef PTX_X1
#undef PTX_X2
#undef PTX_X3
#undef PTX_X4
#undef PTX_X5
#undef PTX_R1
#undef PTX_R2
#undef PTX_R3
#undef PTX_R4
#undef PTX_R5

// ---- Warpgroups (sm_90a) -------------------------------------------------------------------------------------------

template <int registers>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// ---- Clusters (sm_90) ----------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ u32 cluster_size() {
  u32 size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The address, in the cluster's window, of what lies at `address` in the shared memory of block `rank`.
__device__ __forceinline__ u32 mapa(u32 address, u32 rank) {
  u32 mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
__device__ __forceinline__ u32 load_cluster(u32 address) {
  u32 value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_cluster(u32 address, u32 value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
// Both addresses in the same block of the cluster; counts four bytes on its barrier.
__device__ __forceinline__ void st_async(u32 address, u32 value, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address), "r"(value),
               "r"(barrier)
               : "memory");
}

}  // namespace ptx
