// 3x3 convolution, stride 1, zero padding 1, NHWC, as an implicit product of matrices on Hopper, specialised by warps:
// a producer has TMA fill a ring of four stages, two warpgroups multiply with wgmma straight from it and store their
// tiles by TMA. Blocks are persistent: each takes one tile after the other, and the ring runs on from tile to tile.
// Any N, H, W; C and K are multiples of 8: boxes hang over the edges, where TMA reads zeros and writes nothing.
#include "ptx.cuh"
#include "wgmma.cuh"

namespace {

using ptx::u32;
using ptx::u64;

constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2;    // warpgroups, one above the other in the tile; the producer comes after them
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kTileW = 8;   // a row of 8 pixels is one 1024-byte atom of the 128-byte swizzle
constexpr int kGroupH = 8;  // rows of a consumer: 64 pixels, wgmma's M
constexpr int kTileH = kConsumers * kGroupH;
constexpr int kOut = 64;    // output channels of a tile: wgmma's N
constexpr int kSlice = 64;  // input channels of a stage: 128 bytes, as wide as the swizzle
constexpr int kTaps = 9;
constexpr int kStages = 4;

constexpr u32 kRowBytes = 128;  // of a pixel or an output channel in any of the tiles
constexpr u32 kAtomBytes = 8 * kRowBytes;
constexpr u32 kGroupBytes = kGroupH * kTileW * kRowBytes;
constexpr u32 kXBytes = kConsumers * kGroupBytes, kWBytes = kOut * kRowBytes;

// Addresses in shared memory, of which the tiles' have to be multiples of an atom.
struct Shared {
  u32 base;

  __device__ u32 x(u32 stage) const { return base + stage * kXBytes; }
  __device__ u32 w(u32 stage) const { return base + kStages * kXBytes + stage * kWBytes; }
  __device__ u32 y(u32 group) const { return base + kStages * (kXBytes + kWBytes) + group * kGroupBytes; }
  __device__ u32 full(u32 stage) const { return y(kConsumers) + stage * 8; }
  __device__ u32 empty(u32 stage) const { return full(kStages) + stage * 8; }
};

// Where the producer or a consumer is in the ring: `phase` is the parity of the laps it has made.
struct Position {
  u32 stage = 0, phase = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;  // phase: another lap
    }
  }
};

// The tiles of one block, in the order in which it computes them. The blocks of a cluster take different pixels and the
// same output channels, hence the same number of tiles: where pixels run out, a tile beyond the last image.
template <int kCluster>
struct Tiles {
  int down, across, groups /* clusters' worth of tiles of pixels */, count, next, rank;
  int image, row, column, out;

  __device__ Tiles(int n, int h, int w, int k) {
    down = (h + kTileH - 1) / kTileH;
    across = (w + kTileW - 1) / kTileW;
    groups = (n * down * across + kCluster - 1) / kCluster;
    count = groups * ((k + kOut - 1) / kOut);
    next = blockIdx.x / kCluster;
    rank = kCluster > 1 ? ptx::cluster_rank() : 0;
  }

  __device__ bool take() {
    if (next >= count) return false;
    const int tile = next % groups * kCluster + rank;
    column = tile % across * kTileW;
    row = tile / across % down * kTileH;
    image = tile / across / down;
    out = next / groups * kOut;
    next += gridDim.x / kCluster;
    return true;
  }
};

__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// What another block of the cluster has arrived for is visible only to who acquires in the cluster's scope.
template <int kCluster>
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  if constexpr (kCluster > 1) {
    ptx::mbarrier_wait_cluster(barrier, parity);
  } else {
    ptx::mbarrier_wait(barrier, parity);
  }
}

// One warp has done with a stage: every block of the cluster whose producer writes into it is told.
template <int kCluster>
__device__ __forceinline__ void release(u32 empty) {
  const u32 lane = threadIdx.x % 32;
  if constexpr (kCluster > 1) {
    if (lane < kCluster) ptx::mbarrier_arrive_cluster(ptx::mapa(empty, lane));  // arrive: at both blocks
  } else {
    if (lane == 0) ptx::mbarrier_arrive(empty);  // arrive: at this block
  }
}

// One thread.
template <int kCluster>
__device__ void produce(const CUtensorMap* x_map, const CUtensorMap* w_map, Shared shared, Tiles<kCluster> tiles,
                        int c) {
  Position at;  // position: of the producer
  while (tiles.take()) {
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap) {
      for (int channel = 0; channel < c; channel += kSlice) {
        // A barrier that is new counts as past a phase of parity 1: the first lap does not wait.
        wait<kCluster>(shared.empty(at.stage), at.phase ^ 1);  // wait: the stage is free
        const u32 full = shared.full(at.stage);
        ptx::mbarrier_arrive_expect_tx(full, kXBytes + kWBytes);
        const int row = tiles.row + tap / 3 - 1, column = tiles.column + tap % 3 - 1;
        ptx::tma_load_4d(shared.x(at.stage), x_map, full, channel, column, row, tiles.image);
        if constexpr (kCluster > 1) {
          // Each block loads its part of the weights for all. Bytes may arrive at the other's barrier before that block
          // expects them, but not before its last phase is over: its consumers have released the stage since.
          const int part = tiles.rank * (kOut / kCluster);
          const ptx::u16 blocks = (1 << kCluster) - 1;  // mask: the whole cluster
          ptx::tma_load_multicast_3d(shared.w(at.stage) + part * kRowBytes, w_map, full, blocks, channel, tap,
                                     tiles.out + part);
        } else {
          ptx::tma_load_3d(shared.w(at.stage), w_map, full, channel, tap, tiles.out);
        }
        at.advance();
      }
    }
  }
}

// Rows of 128 bytes, swizzled, eight rows an atom. The leading offset is not used: an atom is as wide as the operand.
__device__ __forceinline__ u64 descriptor(u32 start) {
  return ptx::wgmma_descriptor(start, 16, kAtomBytes, 128);  // descriptor: atom to atom
}

__device__ __forceinline__ u32 narrow(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const u32&>(pair);
}

// One warpgroup, `thread` counted in it.
template <int kCluster>
__device__ void consume(const CUtensorMap* y_map, const float* bias, Shared shared, Tiles<kCluster> tiles, int c, int k,
                        int group, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const int steps = kTaps * ((c + kSlice - 1) / kSlice);
  const u32 y = shared.y(group);
  Position at;  // position: of a consumer
  // [8 chunks of 8 channels][upper, lower 8 of the warp's pixels][2 channels]; zeros only in order to be something.
  float acc[32] = {};
  while (tiles.take()) {
    u32 previous = 0;
    for (int step = 0; step < steps; ++step) {
      wait<kCluster>(shared.full(at.stage), at.phase);  // wait: the stage has arrived
      const u64 a = descriptor(shared.x(at.stage) + group * kGroupBytes), b = descriptor(shared.w(at.stage));
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSlice / 16; ++i) {
        // 16 channels on are 32 bytes: the swizzle is of address bits, so descriptors just move along the row.
        ptx::WgmmaBf16<kOut>::ss(acc, a + i * 2, b + i * 2, step > 0 || i > 0);  // a tile's first product overwrites
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // all but this step's, which runs on
      if (step > 0) release<kCluster>(shared.empty(previous));
      previous = at.stage;
      at.advance();
    }
    ptx::wgmma_wait<0>();                       // the sums are complete
    release<kCluster>(shared.empty(previous));  // the last stage of the tile
#pragma unroll
    for (int i = 0; i < 32; ++i) ptx::keep(acc[i]);

    if (thread == 0) ptx::bulk_wait_read<0>();  // only who committed the last store can wait for it
    ptx::bar_sync(1 + group, kWarpgroup);       // barrier: the last tile has left the buffer
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      u32 pair[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int out = tiles.out + (j + i) * 8 + lane % 4 * 2;
        float2 offset = make_float2(0, 0);
        if (out < k) offset = *reinterpret_cast<const float2*>(bias + out);
        const float* sum = acc + (j + i) * 4;
        pair[2 * i] = narrow(sum[0] + offset.x, sum[1] + offset.y);
        pair[2 * i + 1] = narrow(sum[2] + offset.x, sum[3] + offset.y);
      }
      const u32 pixel = warp * 16 + lane % 16, chunk = j + lane / 16;
      ptx::stmatrix_x4(y + pixel * kRowBytes + (chunk ^ pixel % 8) * 16, pair);
    }
    ptx::fence_proxy_async_shared();       // what this thread wrote, before TMA reads it
    ptx::bar_sync(1 + group, kWarpgroup);  // barrier: the whole tile is in the buffer
    if (thread == 0) {
      ptx::tma_store_4d(y_map, y, tiles.out, tiles.column, tiles.row + group * kGroupH, tiles.image);
      ptx::bulk_commit();
    }
  }
  if (thread == 0) ptx::bulk_wait<0>();  // shared memory must outlive the store
}

template <int kCluster>
__device__ void convolve(const CUtensorMap* x_map, const CUtensorMap* w_map, const CUtensorMap* y_map,
                         const float* bias, int n, int h, int w, int c, int k) {
  extern __shared__ unsigned char dynamic[];
  const Shared shared{(ptx::shared_address(dynamic) + kAtomBytes - 1) / kAtomBytes * kAtomBytes};
  const int group = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    ptx::prefetch_map(x_map);
    ptx::prefetch_map(w_map);
    ptx::prefetch_map(y_map);
    for (u32 stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(shared.full(stage), 1);                                         // count: the producer
      ptx::mbarrier_init(shared.empty(stage), kCluster * kConsumers * kWarpgroup / 32);  // count: consumers' warps
    }
    ptx::fence_mbarrier_init();
  }
  // Nobody uses a barrier, here or in the other block, before it is initialised.
  if constexpr (kCluster > 1) {
    cluster_arrive_relaxed();  // the fence above has released what there is to release
    ptx::cluster_wait();
  } else {
    __syncthreads();  // barriers are initialised
  }

  const Tiles<kCluster> tiles(n, h, w, k);
  if (group == kConsumers) {
    ptx::setmaxnreg_dec<40>();
    if (thread == 0) produce<kCluster>(x_map, w_map, shared, tiles, c);
  } else {
    ptx::setmaxnreg_inc<232>();
    consume<kCluster>(y_map, bias, shared, tiles, c, k, group, thread);
  }
  if constexpr (kCluster > 1) {
    // The other block's consumers arrive at this one's barriers to the end, so its shared memory must not go before.
    // (What the other block loads into it has arrived: this one's consumers have waited for all of it.)
    __syncwarp();         // the producer's warp, too, arrives as one
    ptx::cluster_sync();  // cluster barrier: end
  }
}

}  // namespace

// Maps, of 128-byte swizzle: x (N, H, W, C) in boxes (1, 16, 8, 64), w (K, 9, C) in boxes (64, 1, 64), or (32, 1, 64)
// for the cluster, y (N, H, W, K) in boxes (1, 8, 8, 64). Shared memory: 115776 bytes.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    conv3x3_sm90(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                 const __grid_constant__ CUtensorMap y_map, const float* bias /* (K,) */, int n, int h, int w, int c,
                 int k) {
  convolve<1>(&x_map, &w_map, &y_map, bias, n, h, w, c, k);
}

// In clusters of two blocks.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    conv3x3_sm90_cluster(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                         const __grid_constant__ CUtensorMap y_map, const float* bias /* (K,) */, int n, int h, int w,
                         int c, int k) {
  convolve<2>(&x_map, &w_map, &y_map, bias, n, h, w, c, k);
}
