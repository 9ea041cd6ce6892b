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

// Scratch memory of one call, 64-byte aligned, not initialised. Nothing is held between calls: a network's largest
// would be held by every thread that has run it, beside the maps of all its other layers. The allocator keeps what it
// gives back for the next one. In huge pages where the system has them: convolutions go through more of it than the
// processor has translations for. Throws std::bad_alloc, so it is made outside parallel regions only.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return memory_; }

 private:
  char* memory_;
};

}  // namespace refinenet_fast::cpu
