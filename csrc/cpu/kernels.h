// The CPU kernels, for each instruction set; `threads` is how many to use.
#pragma once

#include <cstddef>

#include "common/arguments.h"

namespace refinenet_fast::cpu {

// One instruction set's kernels.
struct Kernels {
  const char* isa;
  void (*maxpool5)(const MaxPool5&, int threads);
  void (*maxpool5_backward)(const MaxPool5Backward&, int threads);
  void (*bilinear)(const Bilinear&, int threads);
  void (*bilinear_backward)(const BilinearBackward&, int threads);
  void (*conv3x3)(const Convolution&, int threads);
  void (*conv1x1)(const Convolution&, int threads);
  void (*weight_grad)(const WeightGrad&, int threads);
};

// The instruction sets built in that this processor has, best first; `count` of them.
const Kernels* const* available_kernels(int* count);

// Those in use: the best available unless `use_isa` chose another.
const Kernels& kernels();

// False if no available instruction set has that name; then nothing changes.
bool use_isa(const char* isa);

// Scratch memory of the calling thread, 64-byte aligned: kept and reused, grown on demand, overwritten by the next
// call. Throws std::bad_alloc, so it is called outside parallel regions only.
void* workspace(size_t bytes);

}  // namespace refinenet_fast::cpu
