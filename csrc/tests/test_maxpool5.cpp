// maxpool5 and its backward against twenty-five compares an output.
#include "tests/check.h"

using namespace refinenet_fast;
using namespace refinenet_fast::test;

namespace {

struct Expected {
  std::vector<float> y, gx;
};

// PyTorch's rule: the first of equal maxima in row-major order takes the gradient.
Expected naive(const std::vector<float>& x, const std::vector<float>& gy, const Shape& s, bool relu) {
  Expected e{std::vector<float>(x.size()), std::vector<float>(x.size())};
  const auto index = [&](int64_t n, int64_t y, int64_t u, int64_t c) { return ((n * s.h + y) * s.w + u) * s.c + c; };
  for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) {
    const int64_t c = i % s.c, u = i / s.c % s.w, y = i / s.c / s.w % s.h, n = i / s.c / s.w / s.h;
    int64_t best = -1;
    const auto value = [&](int64_t at) { return relu && x[at] < 0 ? 0.0f : x[at]; };
    for (int64_t row = y - 2; row <= y + 2; ++row) {
      for (int64_t column = u - 2; column <= u + 2; ++column) {
        if (row < 0 || row >= s.h || column < 0 || column >= s.w) continue;
        const int64_t at = index(n, row, column, c);
        if (best < 0 || value(at) > value(best)) best = at;
      }
    }
    e.y[i] = value(best);
    e.gx[best] += gy[i];
  }
  return e;
}

void run(const cpu::Kernels& kernels, const Shape& s, int threads) {
  const std::vector<float> x = random_tensor(s, 1), gy = random_tensor(s, 2), add = random_tensor(s, 3);
  for (bool relu : {false, true}) {
    Expected e = naive(x, gy, s, relu);
    std::vector<float> y = poisoned(x.size()), y_only = poisoned(x.size()), gx = poisoned(x.size());
    std::vector<uint8_t> argmax(x.size(), 255);
    kernels.maxpool5({x.data(), y_only.data(), nullptr, s, DType::kFloat32, relu}, threads);
    check(close(y_only, e.y, 0), kernels.isa, "value", s, threads);
    kernels.maxpool5({x.data(), y.data(), argmax.data(), s, DType::kFloat32, relu}, threads);
    check(close(y, e.y, 0), kernels.isa, "value beside argmax", s, threads);
    kernels.maxpool5_backward({gy.data(), argmax.data(), nullptr, gx.data(), s, DType::kFloat32}, threads);
    check(close(gx, e.gx, 0), kernels.isa, "gradient", s, threads);
    for (size_t i = 0; i < add.size(); ++i) e.gx[i] += add[i];
    kernels.maxpool5_backward({gy.data(), argmax.data(), add.data(), gx.data(), s, DType::kFloat32}, threads);
    check(close(gx, e.gx, 0), kernels.isa, "gradient into a running one", s, threads);
  }
}

}  // namespace

int main() { return for_all(run); }
