// Bilinear upsample-and-add, any sizes, and its exact adjoint as a gather.
#include "cpu/corners.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {
namespace {

// The taps of every output along one axis.
BilinearTaps* all_taps(const BilinearAxis& axis, BilinearTaps* taps /* [out] */) {
  for (int64_t o = 0; o < axis.out; ++o) taps[o] = bilinear_taps(axis, o);
  return taps;
}

template <class T>
void forward(const Bilinear& p, int threads) {
  const int64_t channels = p.in.c, width = p.columns.out, height = p.rows.out;
  const Workspace workspace(width * sizeof(BilinearTaps));
  const BilinearTaps* columns = all_taps(p.columns, reinterpret_cast<BilinearTaps*>(workspace.data()));
  const bool streamed = p.add != p.y && streams(static_cast<T*>(p.y), p.in.n * height * width, channels);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.in.n * height; ++row) {
      const BilinearTaps tap = bilinear_taps(p.rows, row % height);
      const T* image = static_cast<const T*>(p.x) + row / height * p.in.h * p.in.w * channels;
      for (int64_t x = 0; x < width; ++x) {
        const int64_t out = (row * width + x) * channels;
        const Corners k = corners(tap, columns[x], p.in.w, channels);
        const T* add = p.add ? static_cast<const T*>(p.add) + out : nullptr;
        T* y = static_cast<T*>(p.y) + out;
        for_channels(channels, [&](int64_t c, auto lanes) {
          Float v = blend(image, k, c, lanes);
          if (add) v += load(add + c, lanes);
          put(y + c, v, lanes, streamed);
        });
      }
    }
    fence();
  }
}

// sum over outputs o that read `input` of weight(o) * from[o * stride]; a tap at a time, since at the last input both
// are the same, and infinity times a weight of 0 is NaN there as it is in PyTorch
template <class T, class Count>
Float gather(const BilinearTaps* taps, BilinearReaders readers, int64_t input, const T* from, int64_t stride,
             Count lanes) {
  Float sum{};
  for (int64_t o = readers.begin; o < readers.end; ++o) {
    const Float value = load(from + o * stride, lanes);
    if (taps[o].near == input) sum += splat(1 - taps[o].weight) * value;
    if (taps[o].far == input) sum += splat(taps[o].weight) * value;
  }
  return sum;
}

// gx at row v and columns left ... right - 1: the rows of gy that read v are summed in each column that is needed, and
// of those sums the columns that read u.
template <class T>
void backward_band(const BilinearBackward& p, const BilinearTaps* rows, const BilinearTaps* columns, int64_t n,
                   int64_t v, int64_t left, int64_t right, float* received /* [columns][pitch] */, int64_t pitch) {
  const int64_t channels = p.in.c, width = p.columns.out;
  const T* gy = static_cast<const T*>(p.gy) + n * p.rows.out * width * channels;
  T* gx = static_cast<T*>(p.gx) + (n * p.in.h + v) * p.in.w * channels;
  const BilinearReaders over = bilinear_readers(p.rows, v);
  const int64_t begin = bilinear_readers(p.columns, left).begin, end = bilinear_readers(p.columns, right - 1).end;
  for (int64_t x = begin; x < end; ++x) {
    for_channels(channels, [&](int64_t c, auto lanes) {
      const Float sum = gather(rows, over, v, gy + x * channels + c, width * channels, lanes);
      store(received + (x - begin) * pitch + c, sum);
    });
  }
  for (int64_t u = left; u < right; ++u) {
    const BilinearReaders across = bilinear_readers(p.columns, u);
    for_channels(channels, [&](int64_t c, auto lanes) {
      store(gx + u * channels + c, gather(columns, across, u, received - begin * pitch + c, pitch, Full{}), lanes);
    });
  }
}

template <class T>
void backward(const BilinearBackward& p, int threads) {
  constexpr int64_t kScratchBytes = 256 * 1024;  // half an L2
  const int64_t pitch = round_up(p.in.c, kLanes), height = p.rows.out, width = p.columns.out;
  const int64_t band = smaller(p.in.w, larger(4, kScratchBytes / (pitch * 4 * ceil_div(width, p.in.w))));
  const int64_t bands = ceil_div(p.in.w, band);
  int64_t widest = 0;  // columns of gy that a band needs
  for (int64_t left = 0; left < p.in.w; left += band) {
    const int64_t last = smaller(left + band, p.in.w) - 1;
    widest = larger(widest, bilinear_readers(p.columns, last).end - bilinear_readers(p.columns, left).begin);
  }
  const int64_t bytes = round_up(widest * pitch * 4, 64);
  const int64_t taps_bytes = round_up((height + width) * sizeof(BilinearTaps), 64);
  const Workspace workspace(taps_bytes + bytes * threads);
  char* scratch = workspace.data();
  const BilinearTaps* rows = all_taps(p.rows, reinterpret_cast<BilinearTaps*>(scratch));
  const BilinearTaps* columns = all_taps(p.columns, reinterpret_cast<BilinearTaps*>(scratch) + height);
#pragma omp parallel num_threads(threads)
  {
    float* received = reinterpret_cast<float*>(scratch + taps_bytes + bytes * thread_number());
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.in.n * p.in.h * bands; ++i) {
      const int64_t row = i / bands, left = i % bands * band, right = smaller(left + band, p.in.w);
      backward_band<T>(p, rows, columns, row / p.in.h, row % p.in.h, left, right, received, pitch);
    }
  }
}

}  // namespace

void bilinear(const Bilinear& p, int threads) {
  p.dtype == DType::kFloat32 ? forward<float>(p, threads) : forward<BFloat16>(p, threads);
}

void bilinear_backward(const BilinearBackward& p, int threads) {
  p.dtype == DType::kFloat32 ? backward<float>(p, threads) : backward<BFloat16>(p, threads);
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
