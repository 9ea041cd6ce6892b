// What the tests of plain index functions share.
#pragma once

#include <cstdint>
#include <cstdio>

namespace refinenet_fast::test {

inline int failures = 0;

inline void check(bool ok, const char* what, int64_t a = 0, int64_t b = 0) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s (%lld, %lld)\n", what, static_cast<long long>(a), static_cast<long long>(b));
}

}  // namespace refinenet_fast::test
