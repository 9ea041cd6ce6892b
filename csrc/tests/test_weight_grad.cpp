// weight_grad against the definition in double precision: with and without ReLU and bias, weights of both layouts.

#include "tests/check.h"

using namespace refinenet_fast;
using namespace refinenet_fast::test;

namespace {

double rectified(double v, bool relu) { return relu && v < 0 ? 0 : v; }

// [K, C, 9] of x and gy, then [K] sums of gy.
std::vector<float> expected(const Shape& s, int64_t k, const std::vector<float>& x, const std::vector<float>& gy,
                            bool relu) {
  std::vector<double> sums(k * s.c * 9 + k);
  for (int64_t i = 0; i < s.n * s.h * s.w; ++i) {
    const int64_t column = i % s.w, row = i / s.w % s.h;
    for (int64_t o = 0; o < k; ++o) {
      const double g = gy[i * k + o];
      sums[k * s.c * 9 + o] += g;
      for (int64_t t = 0; t < 9; ++t) {
        const int64_t r = t / 3 - 1, q = t % 3 - 1;
        if (row + r < 0 || row + r >= s.h || column + q < 0 || column + q >= s.w) continue;
        const float* from = x.data() + (i + r * s.w + q) * s.c;
        for (int64_t c = 0; c < s.c; ++c) sums[(o * s.c + c) * 9 + t] += g * rectified(from[c], relu);
      }
    }
  }
  return std::vector<float>(sums.begin(), sums.end());
}

void run_with(const cpu::Kernels& kernels, const Shape& s, int64_t k, bool relu, int threads) {
  std::vector<float> x = random_tensor(s, 1), gy = random_tensor({s.n, s.h, s.w, k}, 2);
  for (float& v : x) v /= 8;
  for (float& v : gy) v /= 8;
  const std::vector<float> want = expected(s, k, x, gy, relu);
  std::vector<float> got = poisoned(want.size());
  float* bias = got.data() + k * s.c * 9;
  kernels.weight_grad({x.data(), gy.data(), got.data(), {9 * s.c, 9, 3, 1}, bias, s, k, DType::kFloat32, relu},
                      threads);
  const float tolerance = 3e-6f * std::sqrt(static_cast<float>(s.n * s.h * s.w)) + 1e-6f;
  check(close(got, want, tolerance), kernels.isa, relu ? "after ReLU" : "plain", s, threads);

  // As (K, 3, 3, C) in memory, without a bias: the same numbers elsewhere.
  std::vector<float> other = poisoned(k * s.c * 9);
  kernels.weight_grad(
      {x.data(), gy.data(), other.data(), {9 * s.c, 1, 3 * s.c, s.c}, nullptr, s, k, DType::kFloat32, relu}, threads);
  bool same = true;
  for (int64_t i = 0; i < k * s.c * 9; ++i) {
    const int64_t t = i % 9, c = i / 9 % s.c, o = i / 9 / s.c;
    same = same && other[(o * 9 + t) * s.c + c] == got[i];
  }
  check(same, kernels.isa, "channels last", s, threads);
}

void run(const cpu::Kernels& kernels, const Shape& s, int threads) {
  for (int64_t k : {1, 8, 35}) run_with(kernels, s, k, k != 8, threads);
}

}  // namespace

int main() { return for_all(run); }
