// What tensor maps take of the driver's interface.
#pragma once

#include <cstring>

#include "cuda_runtime.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_64B = 2, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

namespace fake {

// What a map was made of, where the driver would have its own encoding. The innermost dimension comes first.
struct Map {
  const void* tensor;
  uint64_t sizes[4], strides[3];  // in elements; in bytes, of all dimensions but the first
  uint32_t box[4], rank, type, swizzle;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap), "room for it");

// As the driver checks: aligned addresses and strides, boxes of 256 elements a dimension and rows of one swizzle.
inline CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* tensor,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const auto bad = CUDA_ERROR_INVALID_VALUE;
  if (reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(tensor) % 16 || !tensor) return bad;
  if (rank > 4) return bad;  // more than Map has room for
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1) return bad;
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= uint64_t{1} << 40)) return bad;
  }
  if (box[0] * 2 != (swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128u : 64u)) return bad;
  if (called("cuTensorMapEncodeTiled") != cudaSuccess) {
    runtime.kept = cudaSuccess;  // the runtime knows nothing of the driver's
    return bad;
  }
  Map made{tensor, {}, {}, {}, rank, type, swizzle};
  std::copy(sizes, sizes + rank, made.sizes);
  std::copy(strides, strides + rank - 1, made.strides);
  std::copy(box, box + rank, made.box);
  *map = {};
  std::memcpy(map, &made, sizeof(made));
  ++runtime.maps;
  return CUDA_SUCCESS;
}

}  // namespace fake

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* status) {
  *function = reinterpret_cast<void*>(fake::encode);
  *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
