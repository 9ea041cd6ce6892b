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

int kept_error() { return cudaPeekAtLastError(); }

void forget_error() { cudaGetLastError(); }

bool is_of_earlier_work(int error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

}  // namespace refinenet_fast::cuda
