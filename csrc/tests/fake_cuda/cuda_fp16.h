// Half precision as far as code is compiled with it; nothing computes.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
inline float __half2float(__half v) { return v.bits; }
inline __half __float2half_rn(float) { return {}; }
inline __half2 __hmax2_nan(__half2 a, __half2) { return a; }
