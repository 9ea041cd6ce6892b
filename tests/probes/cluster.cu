// Clusters of blocks.

#include "ptx.cuh"

using ptx::u32;
using ptx::u64;

// d: (blocks, 10). Blocks counted x first.
extern "C" __global__ void ranks(u32* d) {
  u32* row = d + 10 * (blockIdx.x + gridDim.x * blockIdx.y);
  if (threadIdx.x != 0) return;
#define REGISTER(i, name) asm volatile("mov.u32 %0, %%" name ";" : "=r"(row[i]))
  REGISTER(0, "cluster_ctarank");
  REGISTER(1, "cluster_nctarank");
  REGISTER(2, "cluster_ctaid.x");
  REGISTER(3, "cluster_ctaid.y");
  REGISTER(4, "cluster_nctaid.x");
  REGISTER(5, "cluster_nctaid.y");
  REGISTER(6, "clusterid.x");
  REGISTER(7, "clusterid.y");
  REGISTER(8, "nclusterid.x");
  REGISTER(9, "nclusterid.y");
}

// a: (blocks, 32); d: (blocks, 3, 32): the neighbour's row reversed, what the neighbour wrote here (its row + 1), and
// the neighbour's through a generic address.
extern "C" __global__ void exchange(const u32* a, u32* d) {
  __shared__ u32 mine[32], theirs[32];
  const u32 lane = threadIdx.x, neighbour = (ptx::cluster_rank() + 1) % ptx::cluster_size();
  const u32 value = a[32 * blockIdx.x + lane];
  mine[lane] = value;
  ptx::cluster_sync();
  const u32 reversed = ptx::load_cluster(ptx::mapa(ptx::shared_address(mine + 31 - lane), neighbour));
  ptx::store_cluster(ptx::mapa(ptx::shared_address(theirs + lane), neighbour), value + 1);
  const u32* there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine + lane), "r"(neighbour));
  const u32 generic = *static_cast<const volatile u32*>(there);
  ptx::cluster_sync();
  u32* row = d + 96 * blockIdx.x;
  row[lane] = reversed;
  row[32 + lane] = theirs[lane];
  row[64 + lane] = generic;
}

// A pair of blocks; block 0 waits for block 1's stores at its own barrier. a: (32,), d: (32,).
extern "C" __global__ void remote_arrive(const u32* a, u32* d) {
  __shared__ u32 values[32];
  __shared__ u64 stored;
  const u32 lane = threadIdx.x, barrier = ptx::shared_address(&stored);
  if (lane == 0) {
    ptx::mbarrier_init(barrier, 33);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (ptx::cluster_rank() == 1) {
    ptx::store_cluster(ptx::mapa(ptx::shared_address(values + lane), 0), a[lane] + 5);
    ptx::mbarrier_arrive_cluster(ptx::mapa(barrier, 0), lane == 0 ? 2 : 1);
  } else {
    ptx::mbarrier_wait_cluster(barrier, 0);
    d[lane] = values[31 - lane];
  }
  ptx::cluster_sync();
}

// Each of a pair stores into the other's memory, on whose barrier the bytes count. a, d: (2, 32).
extern "C" __global__ void async_store(const u32* a, u32* d) {
  __shared__ u32 values[32];
  __shared__ u64 stored;
  const u32 lane = threadIdx.x, barrier = ptx::shared_address(&stored), other = ptx::cluster_rank() ^ 1;
  if (lane == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, 128);
  }
  ptx::cluster_sync();
  ptx::st_async(ptx::mapa(ptx::shared_address(values + lane), other), a[32 * blockIdx.x + lane],
                ptx::mapa(barrier, other));
  ptx::mbarrier_wait_cluster(barrier, 0);
  d[32 * blockIdx.x + lane] = values[31 - lane];
  ptx::cluster_sync();
}

// The same by one bulk copy from shared memory to shared memory.
extern "C" __global__ void bulk_exchange(const u32* a, u32* d) {
  __shared__ __align__(16) u32 mine[32], theirs[32];
  __shared__ u64 copied;
  const u32 lane = threadIdx.x, barrier = ptx::shared_address(&copied), other = ptx::cluster_rank() ^ 1;
  mine[lane] = a[32 * blockIdx.x + lane];
  ptx::fence_proxy_async_shared();
  if (lane == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, 128);
  }
  ptx::cluster_sync();
  if (lane == 0) {
    ptx::bulk_copy_cluster(ptx::mapa(ptx::shared_address(theirs), other), ptx::shared_address(mine), 128,
                           ptx::mapa(barrier, other));
  }
  ptx::mbarrier_wait_cluster(barrier, 0);
  d[32 * blockIdx.x + lane] = theirs[31 - lane];
  ptx::cluster_sync();
}
