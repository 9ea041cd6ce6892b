// What the C++ tests share: random tensors, comparison, and a loop over the instruction sets this processor has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/kernels.h"

namespace refinenet_fast::test {

inline int failures = 0;

inline std::vector<float> random_tensor(const Shape& s, unsigned seed) {
  std::mt19937 engine(seed);
  // Few values, so that windows have ties.
  std::uniform_int_distribution<int> values(-8, 8);
  std::vector<float> x(s.n * s.h * s.w * s.c);
  for (float& v : x) v = static_cast<float>(values(engine));
  return x;
}

// Poison: what a kernel does not write stays visible.
inline std::vector<float> poisoned(size_t elements) { return std::vector<float>(elements, NAN); }

inline void check(bool ok, const char* isa, const char* what, const Shape& s, int threads) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s on %s, (N, H, W, C) = (%lld, %lld, %lld, %lld), %d threads\n", what, isa,
              static_cast<long long>(s.n), static_cast<long long>(s.h), static_cast<long long>(s.w),
              static_cast<long long>(s.c), threads);
}

inline bool close(const std::vector<float>& got, const std::vector<float>& want, float tolerance) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::fabs(got[i] - want[i]) <= tolerance)) return false;
  }
  return got.size() == want.size();
}

// body(kernels, shape, threads) for every instruction set, odd shapes, and one and three threads.
template <class Body>
int for_all(const Body& body) {
  const Shape shapes[] = {{1, 1, 1, 1},   {2, 1, 5, 3},   {1, 7, 1, 16},    {1, 3, 4, 17},
                          {2, 13, 11, 5}, {1, 9, 70, 33}, {1, 16, 16, 256}, {3, 2, 2, 65}};
  int count;
  const cpu::Kernels* const* list = cpu::available_kernels(&count);
  for (int i = 0; i < count; ++i) {
    for (const Shape& shape : shapes) {
      for (int threads : {1, 3}) body(*list[i], shape, threads);
    }
    std::printf("%s: done\n", list[i]->isa);
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}

}  // namespace refinenet_fast::test
