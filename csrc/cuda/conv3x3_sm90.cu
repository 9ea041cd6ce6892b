// 3x3 and 1x1 convolutions of 16-bit types on Hopper, as csrc/cuda/conv3x3.cu defines them, by TMA and wgmma.
//
// A block is three warpgroups: one thread of the last has TMA fill two rings in shared memory, one of boxes of pixels,
// one of tiles of weights; the other two multiply. Each has 64 pixels, 8 rows of 8, and all output channels of the
// tile: one wgmma of 64 x 256 x 16 a step of 16 channels, whose 128 sums a thread leave room in 232 registers. (Two of
// m64 each would read weights half as often from shared memory, and take 256 registers for sums.) Blocks stay and take
// one tile after the other; while the sums of one leave, the next one's operands arrive.
//
// A slice of 64 channels is read in three boxes of 18 x 8 pixels, one for each dx, not in nine: with tiles 8 pixels
// wide every row is an atom of the swizzle, and dy just moves the operand's descriptor by atoms. Weights are half of
// all bytes then; each of a cluster's two blocks, which take different pixels and the same output channels, loads half
// of every tile for both.
#include <type_traits>
#include <utility>

#include "cuda/arithmetic.h"
#include "cuda/kernels.h"
#include "cuda/plan_sm90.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/tensor_map.h"
#include "cuda/way_out_sm90.h"

namespace refinenet_fast::cuda {
namespace sm90 {
namespace {

// Where things lie in shared memory; boxes and weights have to begin at multiples of an atom.
template <int kOuts>
struct Layout {
  static constexpr int kBoxes = stages_of(kOuts).boxes, kTiles = stages_of(kOuts).weights;
  static constexpr uint32_t kTileBytes = kOuts * kRowBytes;
  uint32_t base;

  __device__ __forceinline__ uint32_t box(uint32_t stage) const { return base + stage * kBoxBytes; }
  __device__ __forceinline__ uint32_t weights(uint32_t stage) const { return box(kBoxes) + stage * kTileBytes; }
  __device__ __forceinline__ uint32_t way_out() const { return weights(kTiles); }
  __device__ __forceinline__ uint32_t box_full(uint32_t stage) const { return way_out() + kOutBytes + stage * 8; }
  __device__ __forceinline__ uint32_t box_empty(uint32_t stage) const { return box_full(kBoxes) + stage * 8; }
  __device__ __forceinline__ uint32_t weights_full(uint32_t stage) const { return box_empty(kBoxes) + stage * 8; }
  __device__ __forceinline__ uint32_t weights_empty(uint32_t stage) const { return weights_full(kTiles) + stage * 8; }
};

// A place in a ring; `phase` is the parity of the laps made.
template <int kStages>
struct Position {
  uint32_t stage = 0, phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// One block's tiles, every so many-th of plan_sm90.h's order; first the cluster's own number.
template <int kOuts>
class Tiles : public SplitTile {
 public:
  __device__ __forceinline__ explicit Tiles(const PackedConvolution& p)
      : order_(tile_order(p, kOuts)),
        slices_(blocks_of<int32_t>(p.shape.c, kSlice)),
        splits_(p.splits),
        next_(blockIdx.x / kCluster) {}

  __device__ __forceinline__ bool take() {
    static_cast<SplitTile&>(*this) = tile_at(order_, next_, static_cast<int32_t>(ptx::cluster_rank()));
    next_ += gridDim.x / kCluster;
    return split < splits_;
  }

  // The split's slices are begin() ... end() - 1.
  __device__ __forceinline__ int32_t begin() const { return split_begin(slices_, split, splits_); }
  __device__ __forceinline__ int32_t end() const { return split_begin(slices_, split + 1, splits_); }

 private:
  TileOrder order_;
  int32_t slices_, splits_, next_;
};

// ---- The producer: one thread ---------------------------------------------------------------------------------------

template <int kOuts>
class Producer {
 public:
  __device__ __forceinline__ Producer(const CUtensorMap& x, const CUtensorMap& weights, Layout<kOuts> shared,
                                      const PackedConvolution& p)
      : x_(x), weights_(weights), shared_(shared), side_(p.side), turned_(p.turned) {}

  __device__ __forceinline__ void load(const Tiles<kOuts>& tiles, int32_t channel) {
    const int32_t radius = side_ / 2;
    for (int32_t dx = 0; dx < side_; ++dx) {
      load_pixels(tiles.first, channel, dx - radius, radius);
      for (int32_t dy = 0; dy < side_; ++dy) load_weights(channel, tiles.out, dy * side_ + dx);
    }
  }

 private:
  __device__ __forceinline__ void load_pixels(const Pixel& first, int32_t channel, int32_t dx, int32_t radius) {
    // A barrier that is new counts as past a phase of parity 1: the first lap does not wait.
    ptx::mbarrier_wait(shared_.box_empty(box_.stage), box_.phase ^ 1);
    const uint32_t full = shared_.box_full(box_.stage);
    ptx::mbarrier_arrive_expect(full, (kTileRows + 2 * radius) * kAtomBytes);
    ptx::load_box(shared_.box(box_.stage), x_, full, channel, first.column + dx, first.row - radius, first.image);
    box_.advance();
  }

  // Half of a tile for both blocks. Its bytes may arrive at the other one's barrier before that block expects them, but
  // not before the last phase there is over: its consumers, too, have told this block that the stage is free.
  __device__ __forceinline__ void load_weights(int32_t channel, int32_t out, int32_t tap) {
    constexpr int32_t kPart = kOuts / kCluster;
    constexpr uint16_t kBoth = (1 << kCluster) - 1;
    ptx::mbarrier_wait(shared_.weights_empty(weight_.stage), weight_.phase ^ 1);
    const uint32_t full = shared_.weights_full(weight_.stage);
    ptx::mbarrier_arrive_expect(full, Layout<kOuts>::kTileBytes);
    const int32_t part = static_cast<int32_t>(ptx::cluster_rank()) * kPart;
    ptx::load_box_for(kBoth, shared_.weights(weight_.stage) + part * kRowBytes, weights_, full, channel, out + part,
                      turned_ ? side_ * side_ - 1 - tap : tap);
    weight_.advance();
  }

  const CUtensorMap &x_ /* [N, H, W, C] */, &weights_ /* [TAPS, K, C] */;
  Layout<kOuts> shared_;
  Position<Layout<kOuts>::kBoxes> box_;
  Position<Layout<kOuts>::kTiles> weight_;
  int32_t side_;
  bool turned_;
};

// ---- Consumers: a warpgroup each ------------------------------------------------------------------------------------

// Math's element type as wgmma multiplies it.
template <class Math, int kOuts>
using Wgmma = std::conditional_t<std::is_same_v<Math, BFloat16>, ptx::WgmmaBf16<kOuts>, ptx::WgmmaF16<kOuts>>;

template <class Math, class In, int kOuts>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(Layout<kOuts> shared, int group) : shared_(shared), group_(group) {}

  // sum = one tile's products, over `boxes` boxes of pixels of `side` taps each.
  __device__ __forceinline__ void multiply(int32_t boxes, int32_t side) {
    uint32_t read_box = 0, read_weights = 0;  // stages that are read by products which may not be over
    for (int32_t box = 0; box < boxes; ++box) {
      ptx::mbarrier_wait(shared_.box_full(box_.stage), box_.phase);
      for (int32_t dy = 0; dy < side; ++dy) {
        ptx::mbarrier_wait(shared_.weights_full(weight_.stage), weight_.phase);
        const bool add = box > 0 || dy > 0;  // a tile's first product overwrites what was there
        multiply_stage(shared_.box(box_.stage) + (group_ * kGroupRows + dy) * kAtomBytes,
                       shared_.weights(weight_.stage), add);
        // All products but these ones are over.
        if (add) release_weights(read_weights);
        if (dy == 0 && box > 0) release_box(read_box);
        read_weights = weight_.stage;
        weight_.advance();
      }
      read_box = box_.stage;
      box_.advance();
    }
    ptx::wgmma_wait<0>();
    release_weights(read_weights);
    release_box(read_box);
#pragma unroll
    for (int i = 0; i < kOuts / 2; ++i) ptx::keep(sum[i]);
  }

  float sum[kOuts / 2] = {};  // [kOuts / 8][upper, lower 8 of a warp's pixels][2]; zeros in order to be something

 private:
  // Leaves one group of products on its way.
  __device__ __forceinline__ void multiply_stage(uint32_t pixels /* [64, kSlice] */, uint32_t weights, bool add) {
    const uint64_t right = ptx::swizzled_operand(weights);
    if constexpr (std::is_same_v<In, Unchanged>) {
      const uint64_t left = ptx::swizzled_operand(pixels);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSlice / 16; ++i) {
        Wgmma<Math, kOuts>::multiply(sum, left + i * 2, right + i * 2, add || i > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
    } else {
      multiply_registers(pixels, right, add);
    }
  }

  // With pixels that pass through registers on their way in. They are changed there and not in shared memory, where
  // they would be written once more, and fenced, between threads that have to wait for each other. While one product
  // runs, the next one's 16 channels are read into other registers.
  __device__ __forceinline__ void multiply_registers(uint32_t pixels, uint64_t right, bool add) {
    const uint32_t lane = threadIdx.x % 32, pixel = threadIdx.x / 32 % 4 * 16 + lane % 16;
    uint32_t left[2][4];
#pragma unroll
    for (int i = 0; i < kSlice / 16; ++i) {
      // Matrices in the order of operand A: upper rows, lower rows, then both again one chunk on.
      ptx::ldmatrix_x4(left[i % 2], pixels + pixel * kRowBytes + ((i * 2 + lane / 16) ^ pixel % 8) * kChunkBytes);
      In::template apply<Math>(left[i % 2]);
      ptx::wgmma_fence();
      Wgmma<Math, kOuts>::multiply(sum, left[i % 2], right + i * 2, add || i > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
    }
  }

  // One warp has done with a stage: whoever writes into it is told.
  __device__ __forceinline__ void release_box(uint32_t stage) {
    if constexpr (!std::is_same_v<In, Unchanged>) __syncwarp();  // every lane has read its rows
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared_.box_empty(stage));
  }

  __device__ __forceinline__ void release_weights(uint32_t stage) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < kCluster) ptx::mbarrier_arrive_at(shared_.weights_empty(stage), lane);
  }

  Layout<kOuts> shared_;
  Position<Layout<kOuts>::kBoxes> box_;
  Position<Layout<kOuts>::kTiles> weight_;
  int group_;
};

// ---- The kernel -----------------------------------------------------------------------------------------------------

template <int kOuts>
__device__ __forceinline__ void prepare(const Layout<kOuts>& shared) {
  if (threadIdx.x == 0) {
    constexpr int kWarps = kConsumers * kWarpgroup / 32;
    for (int stage = 0; stage < Layout<kOuts>::kBoxes; ++stage) {
      ptx::mbarrier_init(shared.box_full(stage), 1);  // the producer
      ptx::mbarrier_init(shared.box_empty(stage), kWarps);
    }
    for (int stage = 0; stage < Layout<kOuts>::kTiles; ++stage) {
      ptx::mbarrier_init(shared.weights_full(stage), 1);
      ptx::mbarrier_init(shared.weights_empty(stage), kCluster * kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncwarp();         // the first warp, too, arrives as one
  ptx::cluster_sync();  // nobody uses a barrier, here or in the other block, before it is initialised
}

template <class Math, class In, int kOuts>
__global__ void __launch_bounds__(kBlockThreads, 1)
    wgmma_kernel(const __grid_constant__ CUtensorMap x /* [N, H, W, C] */,
                 const __grid_constant__ CUtensorMap weights /* [TAPS, K, C] */,
                 const __grid_constant__ CUtensorMap y /* [N, H, W, K] */,
                 const __grid_constant__ CUtensorMap relued /* [N, H, W, K] */,
                 const __grid_constant__ PackedConvolution p) {
  extern __shared__ unsigned char dynamic[];
  const uint32_t start = ptx::shared_address(dynamic), base = (start + kAtomBytes - 1) / kAtomBytes * kAtomBytes;
  const Layout<kOuts> shared{base};
  prepare(shared);

  // From one lane, so that the compiler knows it to be the same in a warp, as operands' addresses have to be.
  const int group = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  const int32_t side = p.side;
  Tiles<kOuts> tiles(p);
  if (group == kConsumers) {
    ptx::give_registers_back<40>();
    if (thread == 0) {
      ptx::prefetch_map(x);
      ptx::prefetch_map(weights);
      Producer<kOuts> producer(x, weights, shared, p);
      while (tiles.take()) {
        const int32_t end = tiles.end();
        for (int32_t slice = tiles.begin(); slice < end; ++slice) producer.load(tiles, slice * kSlice);
      }
    }
    __syncwarp();  // this warp, too, meets the others as one
  } else {
    ptx::take_registers<232>();
    Consumer<Math, In, kOuts> consumer(shared, group);
    const uint32_t own = shared.way_out() + __shfl_sync(0xffffffff, threadIdx.x / 32, 0) * kWarpBytes;
    WarpOut<typename Math::Element, kOuts> out(p, y, relued, own, dynamic + (own - start));
    while (tiles.take()) {
      consumer.multiply((tiles.end() - tiles.begin()) * side, side);
      out.write(tiles.first, tiles.out, tiles.split, consumer.sum);
    }
    out.finish();
  }
  // The other block's consumers arrive at this one's barriers to the end: its shared memory must not go before. (What
  // the other one loads into it has arrived, because this one's consumers have waited for all of it.)
  ptx::cluster_sync();
}

using Kernel = void (*)(CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap, PackedConvolution);

template <class Math, class In>
Kernel kernel_of(int outs) {
  if (outs == 256) return wgmma_kernel<Math, In, 256>;
  return outs == 128 ? wgmma_kernel<Math, In, 128> : wgmma_kernel<Math, In, 64>;
}

template <class Math>
Kernel kernel_of(const PackedConvolution& p, int outs) {
  return p.relu_in ? kernel_of<Math, Rectified>(outs) : kernel_of<Math, Unchanged>(outs);
}

struct Maps {
  CUtensorMap x, weights, y, relued;
};

cudaError_t encode_maps(const PackedConvolution& p, int outs, Maps* maps) {
  const Shape& s = p.shape;
  const int64_t taps = int64_t{p.side} * p.side;
  const int rows = kTileRows + p.side / 2 * 2;
  cudaError_t error = encode_map<4>(&maps->x, p.dtype, p.x, {s.c, s.w, s.h, s.n}, {kSlice, kTileColumns, rows, 1});
  if (error != cudaSuccess) return error;
  error = encode_map<3>(&maps->weights, p.dtype, p.weights, {s.c, p.k, taps}, {kSlice, outs / kCluster, 1});
  if (error != cudaSuccess || !is_plain(p)) return error;
  for (const auto& [map, tensor] : {std::pair(&maps->y, p.out.y), std::pair(&maps->relued, p.out.relued)}) {
    if (!tensor) continue;
    error = encode_map<4>(map, p.dtype, tensor, {p.k, s.w, s.h, s.n},
                          {kOutSlice, kTileColumns, kWarpPixels / kTileColumns, 1});
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int conv3x3(const PackedConvolution& asked, int processors, int device, void* stream) {
  const Plan chosen = plan(asked, kCapability, processors);
  if (!chosen.outs) return cudaErrorInvalidValue;
  PackedConvolution p = asked;
  p.splits = chosen.splits;
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  Maps maps{};
  cudaError_t error = encode_maps(p, chosen.outs, &maps);
  if (error != cudaSuccess) return error;
  const Kernel kernel =
      p.dtype == DType::kBFloat16 ? kernel_of<BFloat16>(p, chosen.outs) : kernel_of<Float16>(p, chosen.outs);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, chosen.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(chosen.blocks);
  config.blockDim = kBlockThreads;
  config.dynamicSmemBytes = static_cast<size_t>(chosen.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  const int failed = launch_kernel(config, kernel, maps.x, maps.weights, maps.y, maps.relued, p);
  return failed || p.splits == 1 ? failed : sum_splits(p, device, stream);
}

}  // namespace sm90
}  // namespace refinenet_fast::cuda
