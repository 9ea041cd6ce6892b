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

Workspace::Workspace(size_t bytes) {
  constexpr size_t kLine = 64, kHugePage = 2 << 20;
  const size_t page = bytes < kHugePage ? kLine : kHugePage, rounded = (bytes + page - 1) / page * page;
  memory_ = static_cast<char*>(std::aligned_alloc(page, rounded));
  if (!memory_ && rounded) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (page == kHugePage) madvise(memory_, rounded, MADV_HUGEPAGE);
#endif
}

Workspace::~Workspace() { std::free(memory_); }

}  // namespace refinenet_fast::cpu
