// Bulk tensor copies, TMA: one thread has a box of a tensor copied, by a tensor map (PTX ISA 9.7.9.25.5). Coordinates
// begin with the innermost dimension, and may lie outside the tensor: what is not there reads as zero, and is not
// stored.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace refinenet_fast::cuda::ptx {

// Fetches a tensor map ahead of its first use (9.7.9.16).
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Into this block's shared memory; the bytes are counted by `barrier` (9.7.9.25.5.2).
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, int32_t x, int32_t y,
                                         int32_t z, int32_t v) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(v)
      : "memory");
}

// To the same place in each block of the cluster whose bit is set in `blocks`; the bytes are counted by each one's own
// barrier (9.7.9.25.5.2, .multicast::cluster).
__device__ __forceinline__ void load_box_for(uint16_t blocks, uint32_t to, const CUtensorMap& map, uint32_t barrier,
                                             int32_t x, int32_t y, int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
      "l"(&map), "r"(barrier), "h"(blocks), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// From this block's shared memory, in the thread's open bulk group (9.7.9.25.5.2).
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t from, int32_t x, int32_t y, int32_t z,
                                          int32_t v) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(from), "r"(x), "r"(y), "r"(z), "r"(v)
               : "memory");
}

// This thread's stores since the last one become a group (9.7.9.25.6.1).
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all of this thread's groups but the newest kPending have read shared memory (9.7.9.25.6.2).
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// What this thread has written to shared memory is seen by copies that begin later (9.7.13.4).
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace refinenet_fast::cuda::ptx
