// The number of the calling thread within its OpenMP team; 0 where OpenMP is missing.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace refinenet_fast::cpu {

static inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace refinenet_fast::cpu
