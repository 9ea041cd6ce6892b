// mbarriers and what they wait for.

#include "ptx.cuh"

using ptx::u32;
using ptx::u64;

// One thread; d: (20,), what each test says.
extern "C" __global__ void states(u32* d) {
  __shared__ u64 object;
  const u32 barrier = ptx::shared_address(&object);
  ptx::mbarrier_init(barrier, 3);
  d[0] = ptx::mbarrier_test_wait_parity(barrier, 0);  // phase 0 runs
  d[1] = ptx::mbarrier_test_wait_parity(barrier, 1);  // the phase before it counts as over
  const u64 first = ptx::mbarrier_arrive(barrier);
  d[2] = ptx::mbarrier_test_wait(barrier, first);
  ptx::mbarrier_arrive(barrier);
  d[3] = ptx::mbarrier_test_wait(barrier, first);
  ptx::mbarrier_arrive(barrier);  // phase 0 over
  d[4] = ptx::mbarrier_test_wait(barrier, first);
  d[5] = ptx::mbarrier_try_wait(barrier, first);
  d[6] = ptx::mbarrier_test_wait_parity(barrier, 0);
  d[7] = ptx::mbarrier_test_wait_parity(barrier, 1);
  const u64 second = ptx::mbarrier_arrive(barrier, 2);
  d[8] = ptx::mbarrier_test_wait(barrier, second);
  ptx::mbarrier_arrive(barrier);  // phase 1 over: the pending count was 3 again
  d[9] = ptx::mbarrier_test_wait(barrier, second);
  d[10] = ptx::mbarrier_test_wait_parity(barrier, 1);
  ptx::mbarrier_arrive_expect_tx(barrier, 48);
  ptx::mbarrier_arrive(barrier, 2);  // no arrival is missing, 48 bytes are
  d[11] = ptx::mbarrier_test_wait_parity(barrier, 0);
  ptx::mbarrier_complete_tx(barrier, 32);
  d[12] = ptx::mbarrier_test_wait_parity(barrier, 0);
  ptx::mbarrier_complete_tx(barrier, 16);  // phase 2 over
  d[13] = ptx::mbarrier_test_wait_parity(barrier, 0);
  ptx::mbarrier_expect_tx(barrier, 16);
  ptx::mbarrier_complete_tx(barrier, 16);  // bytes alone end no phase
  d[14] = ptx::mbarrier_test_wait_parity(barrier, 1);
  ptx::mbarrier_arrive(barrier, 3);  // phase 3 over
  d[15] = ptx::mbarrier_try_wait_parity(barrier, 1);
  ptx::mbarrier_inval(barrier);
  ptx::mbarrier_init(barrier, 1);
  d[16] = ptx::mbarrier_test_wait_parity(barrier, 0);
  d[17] = ptx::mbarrier_test_wait_parity(barrier, 1);
  const u64 third = ptx::mbarrier_arrive(barrier);
  d[18] = ptx::mbarrier_test_wait(barrier, third);
  ptx::mbarrier_inval(barrier);
  // Shared memory again, to be used as any other.
  object = 7;
  d[19] = static_cast<u32>(*static_cast<volatile u64*>(&object));
}

// Warp 0 produces, warp 1 consumes, through two slots. a, d: (rounds, 32); each row reversed, times 3.
extern "C" __global__ void ring(const u32* a, u32 rounds, u32* d) {
  constexpr u32 slots = 2;
  __shared__ u32 values[slots][32];
  __shared__ u64 full[slots], empty[slots];
  const u32 lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < slots; ++i) {
      ptx::mbarrier_init(ptx::shared_address(full + i), 32);
      ptx::mbarrier_init(ptx::shared_address(empty + i), 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (u32 round = 0; round < rounds; ++round) {
    const u32 slot = round % slots, parity = round / slots % 2;
    const u32 filled = ptx::shared_address(full + slot), emptied = ptx::shared_address(empty + slot);
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(emptied, parity ^ 1);  // passes at once in the first turn
      values[slot][lane] = 3 * a[32 * round + lane];
      ptx::mbarrier_arrive(filled);
    } else {
      ptx::mbarrier_wait_loop(filled, parity);
      d[32 * round + lane] = values[slot][31 - lane];
      ptx::mbarrier_arrive(emptied);
    }
  }
}

// a, d: (256,), reversed. Two copies of 512 bytes, counted by one barrier.
extern "C" __global__ void bulk_load(const u32* a, u32* d) {
  __shared__ __align__(16) u32 values[256];
  __shared__ u64 loaded;
  const u32 barrier = ptx::shared_address(&loaded), to = ptx::shared_address(values);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, 1024);
    ptx::bulk_load(to, a, 512, barrier);
    ptx::bulk_load(to + 512, a + 128, 512, barrier);
  }
  ptx::mbarrier_wait(barrier, 0);
  for (u32 i = threadIdx.x; i < 256; i += blockDim.x) d[i] = values[255 - i];
}

// a: (rounds, 64), d: (rounds, 64). One thread of warp 0 loads rows into three slots; warps 1 and 2 add up pairs:
// d[r][i] = a[r][i] + a[r][63 - i].
extern "C" __global__ void bulk_ring(const u32* a, u32 rounds, u32* d) {
  constexpr u32 slots = 3;
  __shared__ __align__(128) u32 values[slots][64];
  __shared__ u64 full[slots], empty[slots];
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < slots; ++i) {
      ptx::mbarrier_init(ptx::shared_address(full + i), 1);
      ptx::mbarrier_init(ptx::shared_address(empty + i), 2);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x != 0) return;
    for (u32 round = 0; round < rounds; ++round) {
      const u32 slot = round % slots, barrier = ptx::shared_address(full + slot);
      ptx::mbarrier_wait(ptx::shared_address(empty + slot), round / slots % 2 ^ 1);
      ptx::mbarrier_arrive_expect_tx(barrier, 256);
      ptx::bulk_load(ptx::shared_address(values[slot]), a + 64 * round, 256, barrier);
    }
  } else {
    const u32 i = threadIdx.x - 32;
    for (u32 round = 0; round < rounds; ++round) {
      const u32 slot = round % slots;
      ptx::mbarrier_wait(ptx::shared_address(full + slot), round / slots % 2);
      d[64 * round + i] = values[slot][i] + values[slot][63 - i];
      __syncwarp();
      if (i % 32 == 0) ptx::mbarrier_arrive(ptx::shared_address(empty + slot));
    }
  }
}

// a, d: (2, 64), e: (64,). Two rows stored in groups of their own; the first one's room is used again as soon as it has
// been read.
extern "C" __global__ void bulk_store(const u32* a, u32* d, u32* e) {
  __shared__ __align__(16) u32 values[2][64];
  const u32 i = threadIdx.x, from = ptx::shared_address(values);
  values[0][i] = a[i] + 1;
  values[1][i] = a[64 + i] + 2;
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (i == 0) {
    ptx::bulk_store(d, from, 256);
    ptx::bulk_commit();
    ptx::bulk_store(d + 64, from + 256, 256);
    ptx::bulk_commit();
    ptx::bulk_wait_read<1>();
  }
  __syncthreads();
  values[0][i] = 5 * a[i];
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (i == 0) {
    ptx::bulk_store(e, from, 256);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

// a, d: (64,): d += a.
extern "C" __global__ void bulk_add(const float* a, float* d) {
  __shared__ __align__(16) float values[64];
  values[threadIdx.x] = a[threadIdx.x];
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_add_f32(d, ptx::shared_address(values), 256);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}
