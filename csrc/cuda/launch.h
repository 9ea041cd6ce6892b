// What every kernel here shares: one thread a vector of channels, element types, and the launch itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include "common/arguments.h"

namespace refinenet_fast::cuda {

constexpr int kThreads = 256;  // a block

// V neighbouring channels of one pixel, moved in one access.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T lane[V];
};

template <class T, int V>
__device__ inline Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

template <class T, int V>
__device__ inline void store(T* p, const Pack<T, V>& value) {
  *reinterpret_cast<Pack<T, V>*>(p) = value;
}

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ inline void narrow(float v, float* to) { *to = v; }
__device__ inline void narrow(float v, __half* to) { *to = __float2half_rn(v); }
__device__ inline void narrow(float v, __nv_bfloat16* to) { *to = __float2bfloat16_rn(v); }

// The index of this thread over the whole grid.
__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// Takes the last coordinate off a flat index.
__device__ inline int64_t pop(int64_t* index, int64_t size) {
  const int64_t last = *index % size;
  *index /= size;
  return last;
}

// The largest V for which V elements of T are 16 bytes, or 1 where channels or an address forbid that.
template <class T>
int vector_lanes(int64_t channels, std::initializer_list<const void*> tensors) {
  constexpr int kLanes = 16 / sizeof(T);
  uintptr_t bits = 0;
  for (const void* p : tensors) bits |= reinterpret_cast<uintptr_t>(p);
  return channels % kLanes == 0 && bits % 16 == 0 ? kLanes : 1;
}

// The caller's device is restored on every way out. Nothing is set where it is the one: cudaSetDevice makes a context,
// with memory of its own, on a device that has none yet, and fails where that is another process's alone.
class OnDevice {
 public:
  explicit OnDevice(int device) : error_(cudaGetDevice(&before_)) {
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    is_other_ = error_ == cudaSuccess;
  }
  ~OnDevice() {
    if (is_other_ && cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();  // nobody is told: nor is it kept
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = -1;
  bool is_other_ = false;
  cudaError_t error_;
};

inline int multiprocessors(int device, int* count) {
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// 10 * major + minor
inline int capability(int device, int* number) {
  int major, minor;
  if (const int error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (const int error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return error;
  *number = 10 * major + minor;
  return cudaSuccess;
}

// A kernel's launch: its own error. What the runtime keeps of an earlier call is neither taken for it nor cleared, as
// both `<<<>>>` with cudaGetLastError() would do.
template <class... Parameters, class... Arguments>
int launch_kernel(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// kernel(arguments) in so many blocks
template <class Arguments>
int launch_blocks(void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads, int shared_bytes,
                  int device, void* stream) {
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (shared_bytes > (48 << 10)) {  // more than every kernel may have: to be allowed on each device
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  return launch_kernel(config, kernel, arguments);
}

// With one thread for each of `count` work items.
template <class Arguments>
int launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t count, int device, void* stream) {
  return launch_blocks(kernel, arguments, (count + kThreads - 1) / kThreads, kThreads, 0, device, stream);
}

// Op<T>::run for the arguments' element type.
template <template <class> class Op, class Arguments>
int by_dtype(const Arguments& arguments, int device, void* stream) {
  switch (arguments.dtype) {
    case DType::kFloat32:
      return Op<float>::run(arguments, device, stream);
    case DType::kFloat16:
      return Op<__half>::run(arguments, device, stream);
    case DType::kBFloat16:
      return Op<__nv_bfloat16>::run(arguments, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace refinenet_fast::cuda
