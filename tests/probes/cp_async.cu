// cp.async by one warp.

#include "ptx.cuh"

using ptx::u32;
using ptx::u8;

// from: (1408,) bytes: 32 pieces of 4, of 8, of 16 and again of 16 bytes; given: (4, 32), how many bytes of each piece
// are read. image: (1408,), what shared memory holds before and, in the end, after.
extern "C" __global__ void sizes(const u8* from, const u32* given, u8* image) {
  __shared__ __align__(16) u8 pieces[1408];
  const u32 lane = threadIdx.x, to = ptx::shared_address(pieces);
  for (u32 i = lane; i < sizeof(pieces); i += 32) pieces[i] = image[i];
  __syncwarp();
  ptx::cp_async_ca<4>(to + 4 * lane, from + 4 * lane, given[lane]);
  ptx::cp_async_ca<8>(to + 128 + 8 * lane, from + 128 + 8 * lane, given[32 + lane]);
  ptx::cp_async_ca<16>(to + 384 + 16 * lane, from + 384 + 16 * lane, given[64 + lane]);
  ptx::cp_async_cg(to + 896 + 16 * lane, from + 896 + 16 * lane, given[96 + lane]);
  ptx::cp_async_wait_all();
  __syncwarp();
  for (u32 i = lane; i < sizeof(pieces); i += 32) image[i] = pieces[i];
}

// The same without the size operand.
extern "C" __global__ void whole(const u8* from, u8* image) {
  __shared__ __align__(16) u8 pieces[1408];
  const u32 lane = threadIdx.x, to = ptx::shared_address(pieces);
  ptx::cp_async_ca<4>(to + 4 * lane, from + 4 * lane);
  ptx::cp_async_ca<8>(to + 128 + 8 * lane, from + 128 + 8 * lane);
  ptx::cp_async_ca<16>(to + 384 + 16 * lane, from + 384 + 16 * lane);
  ptx::cp_async_cg(to + 896 + 16 * lane, from + 896 + 16 * lane);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (u32 i = lane; i < sizeof(pieces); i += 32) image[i] = pieces[i];
}

// from: (tiles, 128), to: (tiles, 128); each tile reversed, with 1 added. A group a tile, also where none is left, so
// that the count of those pending is always the same.
template <int stages>
__device__ void reverse(const float* from, u32 tiles, float* to) {
  __shared__ __align__(16) float ring[stages][128];
  const u32 lane = threadIdx.x;
  const auto fetch = [&](u32 tile) {
    if (tile < tiles)
      ptx::cp_async_cg(ptx::shared_address(&ring[tile % stages][4 * lane]), from + 128 * tile + 4 * lane);
    ptx::cp_async_commit();
  };
  for (u32 tile = 0; tile < stages - 1; ++tile) fetch(tile);
  for (u32 tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<stages - 2>();
    __syncthreads();
    fetch(tile + stages - 1);
    for (int i = 0; i < 4; ++i) to[128 * tile + 32 * i + lane] = ring[tile % stages][127 - 32 * i - lane] + 1;
  }
}
extern "C" __global__ void pipeline_2(const float* from, u32 tiles, float* to) { reverse<2>(from, tiles, to); }
extern "C" __global__ void pipeline_3(const float* from, u32 tiles, float* to) { reverse<3>(from, tiles, to); }

// from, to: (128,). The barrier counts a lane's copies as its arrival (noinc), or that and an arrival of its own.
template <bool noinc>
__device__ void arrive(const float* from, float* to) {
  __shared__ __align__(16) float row[128];
  __shared__ ptx::u64 copied;
  const u32 lane = threadIdx.x, barrier = ptx::shared_address(&copied);
  if (lane == 0) ptx::mbarrier_init(barrier, 32);
  __syncthreads();
  ptx::cp_async_ca<16>(ptx::shared_address(row + 4 * lane), from + 4 * lane);
  if (noinc) {
    ptx::cp_async_mbarrier_arrive_noinc(barrier);
  } else {
    ptx::cp_async_mbarrier_arrive(barrier);
    ptx::mbarrier_arrive(barrier);
  }
  while (!ptx::mbarrier_test_wait_parity(barrier, 0)) {
  }
  for (int i = 0; i < 4; ++i) to[32 * i + lane] = row[127 - 32 * i - lane] + 1;
}
extern "C" __global__ void arrive_noinc(const float* from, float* to) { arrive<true>(from, to); }
extern "C" __global__ void arrive_inc(const float* from, float* to) { arrive<false>(from, to); }
