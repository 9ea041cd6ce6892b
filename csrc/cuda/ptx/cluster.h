// Clusters of blocks that reach each other's shared memory, and how warpgroups share out a block's registers.
#pragma once

#include <cstdint>

namespace refinenet_fast::cuda::ptx {

// This block's number in its cluster (PTX ISA 10.15).
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster meet (9.7.13.3).
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The registers of each thread of this warpgroup: more, when another one has given some back, or fewer (9.7.19.5).
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace refinenet_fast::cuda::ptx
