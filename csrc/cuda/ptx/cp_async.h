// cp.async: copies from global to shared memory that go on while the thread does (PTX ISA 9.7.9.25.3).
#pragma once

#include <cstdint>

namespace refinenet_fast::cuda::ptx {

// The 32-bit address by which these instructions name shared memory (PTX ISA 5.1.6).
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes past L1, of which `given` are read and the others are zeros; both addresses are multiples of 16
// (9.7.9.25.3.1).
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, uint32_t given) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(given) : "memory");
}

// This thread's copies since the last one become a group, possibly an empty one (9.7.9.25.3.2).
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all of this thread's groups but the newest kPending have landed (9.7.9.25.3.3).
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace refinenet_fast::cuda::ptx
