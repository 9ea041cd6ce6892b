// Which instruction set's kernels run. Compiled for the baseline: it runs before anything is known of the processor.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"

namespace refinenet_fast::cpu {

#define REFINENET_FAST_DECLARE(ISA)                                                                    \
  namespace ISA {                                                                                      \
  void maxpool5(const MaxPool5&, int threads);                                                         \
  void maxpool5_backward(const MaxPool5Backward&, int threads);                                        \
  void bilinear(const Bilinear&, int threads);                                                         \
  void bilinear_backward(const BilinearBackward&, int threads);                                        \
  void conv3x3(const Convolution&, int threads);                                                       \
  void conv1x1(const Convolution&, int threads);                                                       \
  void weight_grad(const WeightGrad&, int threads);                                                    \
  }                                                                                                    \
  static const Kernels kernels_##ISA = {#ISA,          ISA::maxpool5,          ISA::maxpool5_backward, \
                                        ISA::bilinear, ISA::bilinear_backward, ISA::conv3x3,           \
                                        ISA::conv1x1,  ISA::weight_grad};

REFINENET_FAST_DECLARE(baseline)
#ifdef REFINENET_FAST_HAVE_AVX2
REFINENET_FAST_DECLARE(avx2)
#endif
#ifdef REFINENET_FAST_HAVE_AVX512
REFINENET_FAST_DECLARE(avx512)
#endif

namespace {

struct Available {
  const Kernels* list[3];
  int count = 0;

  Available() {
#ifdef REFINENET_FAST_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      list[count++] = &kernels_avx512;
    }
#endif
#ifdef REFINENET_FAST_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list[count++] = &kernels_avx2;
#endif
    list[count++] = &kernels_baseline;
  }
};

const Available& available() {
  static const Available found;
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

// Grown on demand, freed when its thread ends. In huge pages where the system has them: convolutions go through more of
// it than the processor has translations for.
struct Scratch {
  static constexpr size_t kHugePage = 2 << 20;
  void* memory = nullptr;
  size_t bytes = 0;

  ~Scratch() { std::free(memory); }

  void* at_least(size_t wanted) {
#ifdef __SANITIZE_ADDRESS__
    const bool enough = wanted == bytes;  // so that an access behind what was asked for is found
#else
    const bool enough = wanted <= bytes;
#endif
    if (!enough) {
      std::free(memory);
      const size_t page = wanted < kHugePage ? 64 : kHugePage, rounded = (wanted + page - 1) / page * page;
      memory = std::aligned_alloc(page, rounded);
      bytes = memory ? wanted : 0;
      if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      if (page == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
    }
    return memory;
  }
};

}  // namespace

const Kernels* const* available_kernels(int* count) {
  *count = available().count;
  return available().list;
}

const Kernels& kernels() {
  const Kernels* forced = chosen.load(std::memory_order_relaxed);
  return forced ? *forced : *available().list[0];
}

bool use_isa(const char* isa) {
  for (int i = 0; i < available().count; ++i) {
    if (std::strcmp(available().list[i]->isa, isa) == 0) {
      chosen.store(available().list[i], std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

void* workspace(size_t bytes) {
  static thread_local Scratch scratch;
  return scratch.at_least(bytes);
}

}  // namespace refinenet_fast::cpu
