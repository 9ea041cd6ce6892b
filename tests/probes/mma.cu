// mma.sync: one warp, fragments as raw registers, a row a lane.

#include "ptx.cuh"

template <int registers, class T>
__device__ void load(T (&fragment)[registers], const T* from) {  // (32, registers)
  for (int i = 0; i < registers; ++i) fragment[i] = from[threadIdx.x * registers + i];
}

template <int registers, class T>
__device__ void store(T* to, const T (&fragment)[registers]) {
  for (int i = 0; i < registers; ++i) to[threadIdx.x * registers + i] = fragment[i];
}

#define PROBE(name, words_a, words_b, words_d, T)                                           \
  extern "C" __global__ void name(const ptx::u32* a, const ptx::u32* b, const T* c, T* d) { \
    ptx::u32 fragment_a[words_a], fragment_b[words_b];                                      \
    T fragment_c[words_d], fragment_d[words_d];                                             \
    load(fragment_a, a);                                                                    \
    load(fragment_b, b);                                                                    \
    load(fragment_c, c);                                                                    \
    ptx::mma_##name(fragment_d, fragment_a, fragment_b, fragment_c);                        \
    store(d, fragment_d);                                                                   \
  }
PROBE(m16n8k16_f16, 4, 2, 4, float)
PROBE(m16n8k16_f16_f16, 4, 2, 2, ptx::u32)
PROBE(m16n8k16_bf16, 4, 2, 4, float)
PROBE(m16n8k8_f16, 2, 1, 4, float)
PROBE(m16n8k8_bf16, 2, 1, 4, float)
PROBE(m16n8k8_tf32, 4, 2, 4, float)
PROBE(m16n8k4_tf32, 2, 1, 4, float)
