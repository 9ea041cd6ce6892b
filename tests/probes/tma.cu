// Bulk tensor copies: a box lands in shared memory, which goes to global memory byte by byte (and back), so that the
// swizzle shows.

#include "ptx.cuh"

extern __shared__ __align__(1024) ptx::u8 box[];

__device__ void fill(const ptx::u8* from, ptx::u32 bytes) {
  for (ptx::u32 i = threadIdx.x; i < bytes; i += blockDim.x) box[i] = from[i];
  ptx::fence_proxy_async_shared();
  __syncthreads();
}

__device__ void dump(ptx::u8* to, ptx::u32 bytes) {
  for (ptx::u32 i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = box[i];
}

__device__ ptx::u32 initialise(ptx::u64* barrier) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(ptx::shared_address(barrier), 1);
    ptx::fence_mbarrier_init();
  }
  return ptx::shared_address(barrier);
}

#define LIST(...) __VA_ARGS__
// image: (bytes,), what shared memory holds before and, in the end, after.
#define LOAD(rank, parameters, coordinates)                                                                   \
  extern "C" __global__ void load_##rank(const __grid_constant__ CUtensorMap map, parameters, ptx::u32 bytes, \
                                         ptx::u8* image) {                                                    \
    __shared__ ptx::u64 loaded;                                                                               \
    const ptx::u32 barrier = initialise(&loaded);                                                             \
    fill(image, bytes);                                                                                       \
    if (threadIdx.x == 0) {                                                                                   \
      ptx::mbarrier_arrive_expect_tx(barrier, bytes);                                                         \
      ptx::tma_load_##rank(ptx::shared_address(box), &map, barrier, coordinates);                             \
    }                                                                                                         \
    ptx::mbarrier_wait(barrier, 0);                                                                           \
    dump(image, bytes);                                                                                       \
  }
#define STORE(rank, parameters, coordinates)                                                                   \
  extern "C" __global__ void store_##rank(const __grid_constant__ CUtensorMap map, parameters, ptx::u32 bytes, \
                                          const ptx::u8* image) {                                              \
    fill(image, bytes);                                                                                        \
    if (threadIdx.x == 0) {                                                                                    \
      ptx::tma_store_##rank(&map, ptx::shared_address(box), coordinates);                                      \
      ptx::bulk_commit();                                                                                      \
      ptx::bulk_wait<0>();                                                                                     \
    }                                                                                                          \
  }
LOAD(1d, int x, x)
LOAD(2d, LIST(int x, int y), LIST(x, y))
LOAD(3d, LIST(int x, int y, int z), LIST(x, y, z))
LOAD(4d, LIST(int x, int y, int z, int w), LIST(x, y, z, w))
LOAD(5d, LIST(int x, int y, int z, int w, int v), LIST(x, y, z, w, v))
STORE(1d, int x, x)
STORE(2d, LIST(int x, int y), LIST(x, y))
STORE(3d, LIST(int x, int y, int z), LIST(x, y, z))
STORE(4d, LIST(int x, int y, int z, int w), LIST(x, y, z, w))
STORE(5d, LIST(int x, int y, int z, int w, int v), LIST(x, y, z, w, v))

// values: (bytes / width,) float32 of the elements loaded: which NaN a fill writes is not documented.
#define LOAD_VALUES(name, T, convert)                                                                              \
  extern "C" __global__ void load_2d_##name(const __grid_constant__ CUtensorMap map, int x, int y, ptx::u32 bytes, \
                                            float* values) {                                                       \
    __shared__ ptx::u64 loaded;                                                                                    \
    const ptx::u32 barrier = initialise(&loaded);                                                                  \
    __syncthreads();                                                                                               \
    if (threadIdx.x == 0) {                                                                                        \
      ptx::mbarrier_arrive_expect_tx(barrier, bytes);                                                              \
      ptx::tma_load_2d(ptx::shared_address(box), &map, barrier, x, y);                                             \
    }                                                                                                              \
    ptx::mbarrier_wait(barrier, 0);                                                                                \
    for (ptx::u32 i = threadIdx.x; i < bytes / sizeof(T); i += blockDim.x)                                         \
      values[i] = convert(reinterpret_cast<const T*>(box)[i]);                                                     \
  }
LOAD_VALUES(f32, float, float)
LOAD_VALUES(bf16, __nv_bfloat16, __bfloat162float)

// A cluster of two blocks, each of which loads one box and sends it to both. images: (2, 2 * bytes).
extern "C" __global__ void multicast_2d(const __grid_constant__ CUtensorMap map, int x, int y, int rows, ptx::u32 bytes,
                                        ptx::u8* images) {
  __shared__ ptx::u64 loaded;
  const ptx::u32 barrier = initialise(&loaded);
  const ptx::u32 rank = ptx::cluster_rank();
  if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(barrier, 2 * bytes);
  ptx::cluster_sync();
  if (threadIdx.x == 0) {
    ptx::tma_load_multicast_2d(ptx::shared_address(box) + rank * bytes, &map, barrier, 3, x,
                               y + static_cast<int>(rank) * rows);
  }
  ptx::mbarrier_wait(barrier, 0);
  dump(images + rank * 2 * bytes, 2 * bytes);
  // A block that ends takes its shared memory along, which the other's copy may still be writing.
  ptx::cluster_sync();
}
