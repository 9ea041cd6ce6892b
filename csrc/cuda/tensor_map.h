// Tensor maps, made on the host by the driver, whose function is looked up at run time: nothing links against libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/arguments.h"

namespace refinenet_fast::cuda {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void*, const cuuint64_t* sizes,
                                 const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

// cuTensorMapEncodeTiled, or null where the driver has none.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &status);
#endif
    const bool known = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return known ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return found;
}

// Of a dense tensor of 16-bit elements, innermost dimension first, in boxes whose rows are 64 or 32 elements and lie
// swizzled by as many bytes. Outside it reads as zero.
template <int kRank>
cudaError_t encode_map(CUtensorMap* map, DType dtype, const void* tensor, const int64_t (&sizes)[kRank],
                       const int (&box)[kRank]) {
  const EncodeTiled encode = encode_tiled();
  if (!encode) return cudaErrorNotSupported;
  cuuint64_t extents[kRank], strides[kRank], bytes = 2;
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    extents[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    strides[i] = bytes *= extents[i];  // of the next dimension; the last one is not read
  }
  const auto type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto swizzle = box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult done =
      encode(map, type, kRank, const_cast<void*>(tensor), extents, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return done == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace refinenet_fast::cuda
