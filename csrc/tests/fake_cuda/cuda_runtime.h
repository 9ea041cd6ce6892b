// A CUDA runtime without a GPU, for the host code of csrc/cuda in plain C++: it notes what is asked of it and fails
// where a test says so. Kernels compile, as functions that nobody calls, with their inline PTX left out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// ---- The language ---------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
// `asm volatile(...)` and `asm(...)` become nothing.
#define asm REFINENET_FAST_NO_ASM
#define REFINENET_FAST_NO_ASM(...)
#define volatile(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned columns) : x(columns) {}
};
inline const dim3 threadIdx, blockIdx, gridDim;
inline constexpr int REFINENET_FAST_NO_ASM = 0;

struct float2 {
  float x, y;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) { return reinterpret_cast<const float&>(bits); }
inline unsigned __float_as_uint(float v) { return reinterpret_cast<const unsigned&>(v); }
inline size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<size_t>(p); }
inline int __shfl_sync(unsigned, int value, int) { return value; }
inline void __syncthreads() {}
inline void __syncwarp() {}

// ---- The runtime ----------------------------------------------------------------------------------------------------

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorECCUncorrectable = 214,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchTimeout = 702,
  cudaErrorAssert = 710,
  cudaErrorHardwareStackError = 714,
  cudaErrorIllegalInstruction = 715,
  cudaErrorMisalignedAddress = 716,
  cudaErrorInvalidAddressSpace = 717,
  cudaErrorInvalidPc = 718,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = struct FakeStream*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fake {

struct Launch {
  const void* kernel;
  int64_t blocks;
  unsigned threads, cluster;
  size_t shared;
  cudaStream_t stream;
  int device;
  size_t allowed;                                     // of dynamic shared memory, for this kernel
  std::vector<std::vector<unsigned char>> arguments;  // a parameter's bytes each
};

// What a test sets, and finds.
struct Runtime {
  int device = 0, capability = 80, processors = 108;
  std::string failing;  // the call that fails,
  int after = 0;        // when it has succeeded so often,
  cudaError_t with = cudaErrorInvalidValue;
  cudaError_t kept = cudaSuccess;
  std::vector<Launch> launches;
  std::vector<std::pair<const void*, size_t>> allowed;
  int maps = 0;      // tensor maps that were made
  int switches = 0;  // calls of cudaSetDevice
};
inline Runtime runtime;

// As CUDA does: a call that fails is kept, one that succeeds changes nothing.
inline cudaError_t called(const char* name) {
  if (runtime.failing != name || runtime.after-- > 0) return cudaSuccess;
  return runtime.kept = runtime.with;
}

template <class T>
std::vector<unsigned char> raw(const T& value) {
  const auto* first = reinterpret_cast<const unsigned char*>(&value);
  return {first, first + sizeof(T)};
}

}  // namespace fake

inline cudaError_t cudaGetDevice(int* device) {
  *device = fake::runtime.device;
  return fake::called("cudaGetDevice");
}

inline cudaError_t cudaSetDevice(int device) {
  ++fake::runtime.switches;
  const cudaError_t error = fake::called("cudaSetDevice");
  if (error == cudaSuccess) fake::runtime.device = device;
  return error;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = fake::runtime.capability;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? fake::runtime.processors
           : attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10
                                                            : capability % 10;
  return fake::called("cudaDeviceGetAttribute");
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  const cudaError_t error = fake::called("cudaFuncSetAttribute");
  if (error == cudaSuccess) fake::runtime.allowed.emplace_back(reinterpret_cast<const void*>(kernel), bytes);
  return error;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "an argument for each parameter");
  const cudaError_t error = fake::called("cudaLaunchKernelEx");
  if (error != cudaSuccess) return error;
  const void* function = reinterpret_cast<const void*>(kernel);
  size_t allowed = 48 << 10;
  for (const auto& [known, bytes] : fake::runtime.allowed) {
    if (known == function) allowed = bytes;
  }
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  fake::runtime.launches.push_back({function,
                                    config->gridDim.x,
                                    config->blockDim.x,
                                    cluster,
                                    config->dynamicSmemBytes,
                                    config->stream,
                                    fake::runtime.device,
                                    allowed,
                                    {fake::raw<Parameters>(given)...}});
  return cudaSuccess;
}

inline cudaError_t cudaPeekAtLastError() { return fake::runtime.kept; }
inline cudaError_t cudaGetLastError() { return std::exchange(fake::runtime.kept, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return fake::called("cudaDriverGetVersion");
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* status);
