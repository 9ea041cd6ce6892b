// 5x5 max pool, stride 1, padding 2, separable: rows, then columns, with the row maxima of five rows kept in cache.
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {
namespace {

constexpr int64_t kRadius = 2, kTaps = 5;

// A work item: rows and columns of one image, all channels.
struct Tile {
  int64_t n, top, bottom, left, right;

  int64_t width() const { return right - left; }
};

// Bands of columns whose scratch fits in half an L2, long runs of memory all the same; and bands of rows where there
// would be too few tiles for the threads otherwise.
struct Tiling {
  int64_t width, columns, height, rows, count;

  Tiling(const Shape& s, int64_t bytes_per_column, int threads) {
    constexpr int64_t kScratchBytes = 256 * 1024, kNarrowest = 4, kShortest = 8, kTilesPerThread = 4;
    width = smaller(s.w, larger(kNarrowest, kScratchBytes / bytes_per_column));
    columns = ceil_div(s.w, width);
    width = ceil_div(s.w, columns);
    const int64_t bands = ceil_div(kTilesPerThread * threads, s.n * columns);
    height = threads > 1 ? smaller(s.h, larger(kShortest, ceil_div(s.h, bands))) : s.h;
    rows = ceil_div(s.h, height);
    count = s.n * columns * rows;
  }

  Tile tile(const Shape& s, int64_t index) const {
    const int64_t left = index % columns * width, top = index / columns % rows * height;
    return {index / columns / rows, top, smaller(top + height, s.h), left, smaller(left + width, s.w)};
  }
};

// The taps of a window around `center` that are inside 0 ... size - 1.
struct Window {
  int64_t begin, count;
  int32_t clipped;  // taps cut off before the first

  Window(int64_t center, int64_t size) {
    begin = larger(0, center - kRadius);
    count = smaller(size, center + kRadius + 1) - begin;
    clipped = static_cast<int32_t>(begin - (center - kRadius));
  }
};

// Row maxima of a tile's columns for five image rows at a time, and the dx byte of each.
struct Ring {
  float* value;  // [5][width][pitch]
  uint8_t* dx;   // [5][width][pitch]
  bool* nan;     // [5]: whether the row holds one
  int64_t row;   // width * pitch

  static int64_t bytes(int64_t row) { return round_up(kTaps * (row * 5 + 1), 64); }
  Ring(char* scratch, int64_t row_elements) : row(row_elements) {
    value = reinterpret_cast<float*>(scratch);
    dx = reinterpret_cast<uint8_t*>(value + kTaps * row);
    nan = reinterpret_cast<bool*>(dx + kTaps * row);
  }
  float* values(int64_t y) const { return value + y % kTaps * row; }
  uint8_t* choices(int64_t y) const { return dx + y % kTaps * row; }
};

// How a maximum is taken. NaN has to survive it, which costs three instructions more a tap; so kFast assumes there is
// none, and a row that proves it wrong is done again.
enum class Mode { kFast, kWithNaN, kArgmax };

template <Mode kMode>
struct Maximum {
  Float best;
  Int tap{};

  explicit Maximum(Float first) : best(first) {}

  void take(Float v, int64_t t) {
    if (kMode == Mode::kFast) {
      best = max(best, v);
    } else {
      const Int take = better(v, best);
      best = select(take, v, best);
      if (kMode == Mode::kArgmax) tap = select(take, Int{} + static_cast<int32_t>(t), tap);
    }
  }
};

// One pixel of the row pass over kCount taps (0: window.count of them). Returns where the last tap was NaN.
template <Mode kMode, bool kRelu, int kCount, class T, class Count>
Int row_maximum(const T* first, int64_t stride, const Window& window, float* value, uint8_t* dx, Count lanes) {
  const int64_t count = kCount ? kCount : window.count;
  Float v = load(first, lanes);
  Int nan = v != v;
  Maximum<kMode> m(kRelu ? relu(v) : v);
  for (int64_t t = 1; t < count; ++t) {
    v = load(first + t * stride, lanes);
    nan = kCount ? v != v : nan | (v != v);
    m.take(kRelu ? relu(v) : v, t);
  }
  store(value, m.best);
  if (kMode == Mode::kArgmax) store(dx, m.tap + window.clipped);
  return nan;
}

// Every pixel is the last tap of some window, or in one that is clipped: so all are asked whether they are NaN.
template <class T, Mode kMode, bool kRelu>
bool row_pass(const T* image, const Shape& s, const Tile& tile, const Ring& ring, int64_t y, int64_t pitch) {
  Int nan{};
  for (int64_t x = tile.left; x < tile.right; ++x) {
    const Window window(x, s.w);
    const T* first = image + (y * s.w + window.begin) * s.c;
    float* value = ring.values(y) + (x - tile.left) * pitch;
    uint8_t* dx = ring.choices(y) + (x - tile.left) * pitch;
    const bool all_asked = window.count == kTaps && x > tile.left;
    for_channels(s.c, [&](int64_t c, auto lanes) {
      nan |= all_asked ? row_maximum<kMode, kRelu, kTaps>(first + c, s.c, window, value + c, dx + c, lanes)
                       : row_maximum<kMode, kRelu, 0>(first + c, s.c, window, value + c, dx + c, lanes);
    });
  }
  return any(nan);
}

template <class T, Mode kMode, bool kRelu, int kCount>
void column_pass(const MaxPool5& p, const Tile& tile, const Ring& ring, int64_t y, int64_t pitch) {
  const Window window(y, p.shape.h);
  const int64_t count = kCount ? kCount : window.count;
  const float* rows[kTaps];
  for (int64_t t = 0; t < count; ++t) rows[t] = ring.values(window.begin + t);
  const uint8_t* dx = ring.choices(y);
  const bool streamed = streams(static_cast<T*>(p.y), p.shape.n * p.shape.h * p.shape.w, p.shape.c);
  for (int64_t x = tile.left; x < tile.right; ++x) {
    const int64_t out = ((tile.n * p.shape.h + y) * p.shape.w + x) * p.shape.c, in = (x - tile.left) * pitch;
    for_channels(p.shape.c, [&](int64_t c, auto lanes) {
      Maximum<kMode> m(load(rows[0] + in + c));
      for (int64_t t = 1; t < count; ++t) m.take(load(rows[t] + in + c), t);
      // ReLU commutes with the maximum, but not with the choice among ties, for which the row pass did it.
      const Float value = kRelu && kMode != Mode::kArgmax ? relu(m.best) : m.best;
      put(static_cast<T*>(p.y) + out + c, value, lanes, streamed);
      if (kMode == Mode::kArgmax) store(p.argmax + out + c, load(dx + in + c) | (m.tap + window.clipped) << 3, lanes);
    });
  }
}

template <class T, Mode kMode, bool kRelu>
void column_pass(const MaxPool5& p, const Tile& tile, const Ring& ring, int64_t y, int64_t pitch) {
  Window(y, p.shape.h).count == kTaps ? column_pass<T, kMode, kRelu, kTaps>(p, tile, ring, y, pitch)
                                      : column_pass<T, kMode, kRelu, 0>(p, tile, ring, y, pitch);
}

template <class T, bool kArgmax, bool kRelu>
void forward_tile(const MaxPool5& p, const Tile& tile, const Ring& ring, int64_t pitch) {
  const Shape& s = p.shape;
  const T* image = static_cast<const T*>(p.x) + tile.n * s.h * s.w * s.c;
  int64_t ready = larger(0, tile.top - kRadius);
  for (int64_t y = tile.top; y < tile.bottom; ++y) {
    const Window window(y, s.h);
    for (; ready < window.begin + window.count; ++ready) {
      if (kArgmax) {
        row_pass<T, Mode::kArgmax, kRelu>(image, s, tile, ring, ready, pitch);
      } else {
        bool& nan = ring.nan[ready % kTaps];
        nan = row_pass<T, Mode::kFast, false>(image, s, tile, ring, ready, pitch);
        if (nan) row_pass<T, Mode::kWithNaN, false>(image, s, tile, ring, ready, pitch);
      }
    }
    bool nan = false;
    for (int64_t t = 0; t < window.count && !kArgmax; ++t) nan |= ring.nan[(window.begin + t) % kTaps];
    if (kArgmax) {
      column_pass<T, Mode::kArgmax, kRelu>(p, tile, ring, y, pitch);
    } else if (nan) {
      column_pass<T, Mode::kWithNaN, kRelu>(p, tile, ring, y, pitch);
    } else {
      column_pass<T, Mode::kFast, kRelu>(p, tile, ring, y, pitch);
    }
  }
}

template <class T, bool kArgmax, bool kRelu>
void forward(const MaxPool5& p, int threads) {
  const int64_t pitch = round_up(p.shape.c, kLanes);
  const Tiling tiling(p.shape, kTaps * pitch * 5, threads);
  const int64_t row = tiling.width * pitch, bytes = Ring::bytes(row);
  const Workspace workspace(bytes * threads);
#pragma omp parallel num_threads(threads)
  {
    const Ring ring(workspace.data() + bytes * thread_number(), row);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tiling.count; ++i) {
      forward_tile<T, kArgmax, kRelu>(p, tiling.tile(p.shape, i), ring, pitch);
    }
    fence();
  }
}

template <class T>
void forward_of(const MaxPool5& p, int threads) {
  if (p.argmax) {
    p.relu ? forward<T, true, true>(p, threads) : forward<T, true, false>(p, threads);
  } else {
    p.relu ? forward<T, false, true>(p, threads) : forward<T, false, false>(p, threads);
  }
}

// What row v receives through the column pass: the sum, over those rows y whose dy points at v, of gy.
template <class T, int kCount>
void gather_columns(const MaxPool5Backward& p, const Tile& tile, int64_t v, float* received, int64_t pitch) {
  const Shape& s = p.shape;
  const Window window(v, s.h);
  const int64_t count = kCount ? kCount : window.count;
  const int64_t left = larger(0, tile.left - kRadius), right = smaller(s.w, tile.right + kRadius);
  for (int64_t x = left; x < right; ++x) {
    const int64_t at = ((tile.n * s.h + window.begin) * s.w + x) * s.c;
    const T* gy = static_cast<const T*>(p.gy) + at;
    const uint8_t* argmax = p.argmax + at;
    for_channels(s.c, [&](int64_t c, auto lanes) {
      Float sum{};
      for (int64_t t = 0; t < count; ++t) {
        const int64_t y = t * s.w * s.c + c;
        const int32_t dy = static_cast<int32_t>(kTaps - 1 - window.clipped - t);  // from row begin + t to row v
        sum += keep((load(argmax + y, lanes) >> 3) == dy, load(gy + y, lanes));
      }
      store(received + (x - left) * pitch + c, sum);
    });
  }
}

// And through the row pass: the sum, over those columns x of row v whose dx points at u, of what they received.
template <class T>
void gather_rows(const MaxPool5Backward& p, const Tile& tile, int64_t v, const float* received, int64_t pitch) {
  const Shape& s = p.shape;
  const int64_t left = larger(0, tile.left - kRadius), row = (tile.n * s.h + v) * s.w;
  for (int64_t u = tile.left; u < tile.right; ++u) {
    const Window window(u, s.w);
    const uint8_t* argmax = p.argmax + (row + window.begin) * s.c;
    const float* from = received + (window.begin - left) * pitch;
    const int64_t out = (row + u) * s.c;
    for_channels(s.c, [&](int64_t c, auto lanes) {
      Float sum{};
      for (int64_t t = 0; t < window.count; ++t) {
        const int32_t dx = static_cast<int32_t>(kTaps - 1 - window.clipped - t);  // from column begin + t to column u
        sum += keep((load(argmax + t * s.c + c, lanes) & 7) == dx, load(from + t * pitch + c));
      }
      if (p.add) sum += load(static_cast<const T*>(p.add) + out + c, lanes);
      store(static_cast<T*>(p.gx) + out + c, sum, lanes);
    });
  }
}

template <class T>
void backward(const MaxPool5Backward& p, int threads) {
  const int64_t pitch = round_up(p.shape.c, kLanes);
  const Tiling tiling(p.shape, pitch * (4 + kTaps * (1 + static_cast<int64_t>(sizeof(T)))), threads);
  const int64_t bytes = round_up((tiling.width + 2 * kRadius) * pitch * 4, 64);
  const Workspace workspace(bytes * threads);
#pragma omp parallel num_threads(threads)
  {
    float* received = reinterpret_cast<float*>(workspace.data() + bytes * thread_number());  // [width + 4][pitch]
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tiling.count; ++i) {
      const Tile tile = tiling.tile(p.shape, i);
      for (int64_t v = tile.top; v < tile.bottom; ++v) {
        Window(v, p.shape.h).count == kTaps ? gather_columns<T, kTaps>(p, tile, v, received, pitch)
                                            : gather_columns<T, 0>(p, tile, v, received, pitch);
        gather_rows<T>(p, tile, v, received, pitch);
      }
    }
  }
}

}  // namespace

void maxpool5(const MaxPool5& p, int threads) {
  p.dtype == DType::kFloat32 ? forward_of<float>(p, threads) : forward_of<BFloat16>(p, threads);
}

void maxpool5_backward(const MaxPool5Backward& p, int threads) {
  p.dtype == DType::kFloat32 ? backward<float>(p, threads) : backward<BFloat16>(p, threads);
}

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
