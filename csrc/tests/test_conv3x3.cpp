// conv3x3 against the definition in double precision: every way in and out, and weights turned for the input gradient.

#include "tests/check.h"

using namespace refinenet_fast;
using namespace refinenet_fast::test;

namespace {

std::vector<float> centred(const Shape& s, unsigned seed) {
  std::vector<float> x = random_tensor(s, seed);
  for (float& v : x) v /= 8;
  return x;
}

double relu(double v) { return v > 0 ? v : 0; }

struct Problem {
  Shape in, out;
  std::vector<float> x, weight /* [K, C, 3, 3] */, bias, select, raw, rectified;

  Problem(const Shape& s, int64_t k) : in(s), out{s.n, s.h, s.w, k} {
    x = centred(in, 1);
    weight = centred({k, s.c, 3, 3}, 2);
    bias = centred({1, 1, 1, k}, 3);
    select = centred(out, 4);
    raw = centred(out, 5);
    rectified = centred(out, 6);
  }

  // The sum over the window of pixel (n, y, x) and output k, of relu(x) where `relu_in`.
  double product(int64_t n, int64_t row, int64_t column, int64_t k, bool relu_in, bool turned) const {
    double sum = 0;
    for (int64_t r = -1; r <= 1; ++r) {
      for (int64_t s = -1; s <= 1; ++s) {
        if (row + r < 0 || row + r >= in.h || column + s < 0 || column + s >= in.w) continue;
        const int64_t tap = turned ? (1 - r) * 3 + 1 - s : (r + 1) * 3 + s + 1;
        for (int64_t c = 0; c < in.c; ++c) {
          const double value = x[((n * in.h + row + r) * in.w + column + s) * in.c + c];
          sum += (relu_in ? relu(value) : value) * weight[(turned ? c * out.c + k : k * in.c + c) * 9 + tap];
        }
      }
    }
    return sum;
  }

  std::vector<float> expected(bool steps, bool turned) const {
    std::vector<float> y(raw.size());
    for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
      const int64_t k = i % out.c, column = i / out.c % out.w, row = i / out.c / out.w % out.h;
      double value = product(i / out.c / out.w / out.h, row, column, k, steps, turned);
      if (steps) value = (select[i] <= 0 ? 0 : relu(value + bias[k])) + raw[i] + relu(rectified[i]);
      y[i] = static_cast<float>(value);
    }
    return y;
  }
};

void run_with(const cpu::Kernels& kernels, const Shape& s, int64_t k, int threads) {
  const Problem p(s, k);
  const void* add[] = {p.raw.data(), p.rectified.data()};
  std::vector<float> y = poisoned(p.raw.size());
  Convolution all_steps{p.x.data(), p.weight.data(), {9 * s.c, 9, 3, 1}, p.bias.data(), p.select.data(), add, 2, 1};
  all_steps.y = y.data();
  all_steps.shape = s;
  all_steps.k = k;
  all_steps.relu_in = all_steps.relu_out = true;
  kernels.conv3x3(all_steps, threads);
  const float tolerance = 6e-6f * std::sqrt(9.0f * s.c);
  check(close(y, p.expected(true, false), tolerance), kernels.isa, "all steps", s, threads);

  // The same memory as [C, K, 3, 3], from its last tap backwards.
  y = poisoned(y.size());
  Convolution turned{p.x.data(), p.weight.data() + 8, {9, 9 * k, -3, -1}};
  turned.y = y.data();
  turned.shape = s;
  turned.k = k;
  kernels.conv3x3(turned, threads);
  check(close(y, p.expected(false, true), tolerance), kernels.isa, "turned weights", s, threads);
}

void run(const cpu::Kernels& kernels, const Shape& s, int threads) {
  for (int64_t k : {1, 8, 35}) run_with(kernels, s, k, threads);
  if (s.c == 256) {
    run_with(kernels, {1, 17, 18, 256}, 35, threads);  // several blocks, the last of them short
    run_with(kernels, {1, 5, 9, 300}, 35, threads);    // more channels than are multiplied at once
  }
  run_with(kernels, {0, s.h, s.w, s.c}, 8, threads);
}

}  // namespace

int main() { return for_all(run); }
