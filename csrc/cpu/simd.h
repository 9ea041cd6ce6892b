// Vectors of float32 lanes over the instruction set this file is compiled for, by GCC's and Clang's vector extensions.
// Everything is in a namespace of the instruction set's name and nothing comes from the standard library's templates:
// the linker merges functions of one name, and must not hand AVX-512 code to a processor without it.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#ifndef REFINENET_FAST_ISA
#error "define REFINENET_FAST_ISA: baseline, avx2 or avx512"
#endif

namespace refinenet_fast::cpu::REFINENET_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Float __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));

struct BFloat16 {
  uint16_t bits;
};

static inline Float splat(float value) { return value - Float{}; }
// The larger; `b` where either is NaN.
static inline Float max(Float a, Float b) { return a > b ? a : b; }
// Whether any lane of a comparison's result is set.
#if defined(__AVX512F__)
static inline bool any(Int mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
#elif defined(__AVX2__)
static inline bool any(Int mask) { return _mm256_movemask_epi8((__m256i)mask) != 0; }
#elif defined(__SSE2__)
static inline bool any(Int mask) { return _mm_movemask_epi8((__m128i)mask) != 0; }
#else
static inline bool any(Int mask) {
  int32_t seen = 0;
  for (int i = 0; i < kLanes; ++i) seen |= mask[i];
  return seen != 0;
}
#endif
static inline Float select(Int mask, Float yes, Float no) { return mask ? yes : no; }
static inline Int select(Int mask, Int yes, Int no) { return mask ? yes : no; }
// The value where the mask is set, else +0: a choice, not a product, so that NaN and infinity do not leak.
static inline Float keep(Int mask, Float value) { return (Float)((Int)value & mask); }
// As PyTorch's: NaN stays NaN.
static inline Float relu(Float v) { return keep(~(v <= Float{}), v); }
// Whether `v` replaces `best` in a max pool: it is larger, or NaN.
static inline Int better(Float v, Float best) { return (v > best) | (v != v); }

static inline Float widen(Float v) { return v; }
static inline Float widen(Halves v) { return (Float)(__builtin_convertvector(v, Bits) << 16); }

// Bytes to and from lanes of 0 ... 255. On x86 by intrinsics: GCC 12 takes a generic conversion apart lane by lane.
#if defined(__AVX512F__)
static inline Int widen(Bytes v) { return (Int)_mm512_cvtepu8_epi32((__m128i)v); }
static inline Bytes narrow_bytes(Int v) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)v); }
#elif defined(__AVX2__)
static inline Int widen(Bytes v) { return (Int)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)v)); }
static inline Bytes narrow_bytes(Int v) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(words, words));
}
#elif defined(__SSE2__)
static inline Int widen(Bytes v) {
  const __m128i zero = _mm_setzero_si128();
  return (Int)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128((int32_t)v), zero), zero);
}
static inline Bytes narrow_bytes(Int v) {
  const __m128i words = _mm_packs_epi32((__m128i)v, (__m128i)v);
  return (Bytes)_mm_cvtsi128_si32(_mm_packus_epi16(words, words));
}
#else
static inline Int widen(Bytes v) { return __builtin_convertvector(v, Int); }
static inline Bytes narrow_bytes(Int v) { return __builtin_convertvector(v, Bytes); }
#endif

template <class T>
struct Memory;  // what a vector of kLanes elements of T is in memory

template <>
struct Memory<float> {
  typedef Float Vector;
  static inline Float narrow(Float v) { return v; }
};

template <>
struct Memory<BFloat16> {
  typedef Halves Vector;
  // Round to nearest, ties to even; NaN stays a quiet NaN.
  static inline Halves narrow(Float v) {
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits quiet = (bits >> 16) | 0x40;
    return __builtin_convertvector((Bits)select(v != v, (Int)quiet, (Int)rounded), Halves);
  }
};

template <>
struct Memory<uint8_t> {
  typedef Bytes Vector;
  static inline Bytes narrow(Int v) { return narrow_bytes(v); }
};

// How many elements a vector holds: all lanes, known to the compiler, or fewer at the end of the channels.
struct Full {};
struct Partial {
  int64_t lanes;
};

static inline size_t lanes_of(Full) { return kLanes; }
static inline size_t lanes_of(Partial p) { return p.lanes; }

// kLanes elements from p on as float32 (bytes as int32); the lanes that `count` leaves out are 0.
template <class T, class Count = Full>
static inline auto load(const T* p, Count count = {}) {
  typename Memory<T>::Vector v{};
  memcpy(&v, p, lanes_of(count) * sizeof(T));
  return widen(v);
}

template <class T, class V, class Count = Full>
static inline void store(T* p, V value, Count count = {}) {
  const auto v = Memory<T>::narrow(value);
  memcpy(p, &v, lanes_of(count) * sizeof(T));
}

// A store past the caches, for what is too large to be found there again: it spares reading the line first. `p` is
// aligned to a vector. fence() before another thread reads it.
#if defined(__AVX512F__)
static inline void stream(float* p, Float v) { _mm512_stream_ps(p, (__m512)v); }
#elif defined(__AVX2__)
static inline void stream(float* p, Float v) { _mm256_stream_ps(p, (__m256)v); }
#elif defined(__SSE2__)
static inline void stream(float* p, Float v) { _mm_stream_ps(p, (__m128)v); }
#else
static inline void stream(float* p, Float v) { store(p, v); }
#endif
#ifdef __SSE2__
static inline void fence() { _mm_sfence(); }
#else
static inline void fence() {}
#endif

// Whether a [pixels, channels] result is too large for the outer cache to keep it for whoever reads it next.
template <class T>
static inline bool streams(const T*, int64_t, int64_t) {
  return false;
}
static inline bool streams(const float* y, int64_t pixels, int64_t channels) {
  constexpr int64_t kCached = 8 << 20;
  return pixels * channels * 4 > kCached && channels % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(y) % kVectorBytes == 0;
}
// store() or stream(), which takes whole vectors of float32 only.
static inline void put(float* p, Float v, Full, bool streamed) { streamed ? stream(p, v) : store(p, v); }
template <class T, class Count>
static inline void put(T* p, Float v, Count lanes, bool) {
  store(p, v, lanes);
}

// body(c, count) for each vector of channels, whole ones first.
template <class Body>
static inline void for_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(c, Full{});
  if (c < channels) body(c, Partial{channels - c});
}

static constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace refinenet_fast::cpu::REFINENET_FAST_ISA
