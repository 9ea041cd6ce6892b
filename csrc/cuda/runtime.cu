// What the bindings ask CUDA's runtime.
#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace refinenet_fast::cuda {

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int built_version() { return CUDART_VERSION; }

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace refinenet_fast::cuda
