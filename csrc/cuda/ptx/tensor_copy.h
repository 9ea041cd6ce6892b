// Bulk tensor copies, TMA: one thread has a box of a tensor copied, by a tensor map (PTX ISA 9.7.9.25.5). Coordinates
// begin with the innermost dimension, and may lie outside the tensor: what is not there reads as zero.
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

}  // namespace refinenet_fast::cuda::ptx
