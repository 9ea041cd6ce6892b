// bilinear against the definition in double precision, and its backward against the transposed sum.
#include "tests/check.h"

using namespace refinenet_fast;
using namespace refinenet_fast::test;

namespace {

// Weight of input i in output o: a hat function around the sampled position.
double weight(const BilinearAxis& axis, int64_t o, int64_t i) {
  double at = axis.align_corners ? (axis.out > 1 ? double(o) * (axis.in - 1) / (axis.out - 1) : 0.0)
                                 : (o + 0.5) * axis.in / axis.out - 0.5;
  at = std::fmin(std::fmax(at, 0.0), double(axis.in - 1));
  return std::fmax(0.0, 1.0 - std::fabs(at - i));
}

// to[n, p, q, c] = sum over r, s of row(p, r) column(q, s) from[n, r, s, c]
template <class Row, class Column>
std::vector<float> weighted(const std::vector<float>& from, const Shape& in, const Shape& out, const Row& row,
                            const Column& column) {
  std::vector<float> to(out.n * out.h * out.w * out.c);
  for (int64_t i = 0; i < static_cast<int64_t>(to.size()); ++i) {
    const int64_t c = i % out.c, q = i / out.c % out.w, p = i / out.c / out.w % out.h, n = i / out.c / out.w / out.h;
    double sum = 0;
    for (int64_t r = 0; r < in.h; ++r) {
      if (row(p, r) == 0) continue;
      for (int64_t s = 0; s < in.w; ++s) {
        const double w = column(q, s);
        if (w != 0) sum += row(p, r) * w * from[((n * in.h + r) * in.w + s) * in.c + c];
      }
    }
    to[i] = static_cast<float>(sum);
  }
  return to;
}

void run_to(const cpu::Kernels& kernels, const Shape& in, const Shape& out, bool align_corners, int threads) {
  const BilinearAxis rows{in.h, out.h, align_corners}, columns{in.w, out.w, align_corners};
  const auto row = [&](int64_t o, int64_t i) { return weight(rows, o, i); };
  const auto column = [&](int64_t o, int64_t i) { return weight(columns, o, i); };
  const std::vector<float> x = random_tensor(in, 1), gy = random_tensor(out, 2);
  std::vector<float> want = weighted(x, in, out, row, column), y = poisoned(want.size());
  kernels.bilinear({x.data(), nullptr, y.data(), in, rows, columns, DType::kFloat32}, threads);
  check(close(y, want, 1e-4f), kernels.isa, "resized", in, threads);
  kernels.bilinear({x.data(), y.data(), y.data(), in, rows, columns, DType::kFloat32}, threads);
  for (float& v : want) v *= 2;
  check(close(y, want, 2e-4f), kernels.isa, "resized and added in place", in, threads);

  const auto adjoint = weighted(
      gy, out, in, [&](int64_t i, int64_t o) { return row(o, i); }, [&](int64_t i, int64_t o) { return column(o, i); });
  std::vector<float> gx = poisoned(adjoint.size());
  kernels.bilinear_backward({gy.data(), gx.data(), in, rows, columns, DType::kFloat32}, threads);
  check(close(gx, adjoint, 1e-3f), kernels.isa, "adjoint", in, threads);
}

void run(const cpu::Kernels& kernels, const Shape& in, int threads) {
  const int64_t sizes[][2] = {{2 * in.h, 2 * in.w}, {1, 1}, {19, 37}, {in.h, in.w}, {3, 1}};
  for (const auto& size : sizes) {
    for (bool align_corners : {false, true}) {
      run_to(kernels, in, {in.n, size[0], size[1], in.c}, align_corners, threads);
    }
  }
}

}  // namespace

int main() { return for_all(run); }
