// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set that a CPU kernel is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace ctxops {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

// Vectors travel between inlined functions only: their calling convention is of no concern.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#define CTXOPS_INLINE_LAMBDA __attribute__((always_inline))

// A vector of lanes of a and b, numbered through: `lane` is an expression in the pack kLane.
#if defined(__clang__) || __GNUC__ >= 12
#define CTXOPS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, (__VA_ARGS__)...)
#else
template <size_t kLaneBytes, size_t kBytes>
struct MaskOf {
  using Index = std::conditional_t<kLaneBytes == 4, int32_t, int64_t>;
  typedef Index type __attribute__((vector_size(kBytes)));
};
#define CTXOPS_SHUFFLE(a, b, ...) \
  __builtin_shuffle(              \
      a, b, typename MaskOf<sizeof(a) / sizeof...(kLane), sizeof(a)>::type{(__VA_ARGS__)...})
#endif

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
CTXOPS_INLINE Vector<A> load_vector(const A* from) {
  Vector<A> v;
  memcpy(&v, from, sizeof v);
  return v;
}

// The first `count` lanes, the others 0.
template <typename A>
CTXOPS_INLINE Vector<A> load_vector(const A* from, int64_t count) {
  Vector<A> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

template <typename A>
CTXOPS_INLINE void store_vector(A* to, Vector<A> v) {
  memcpy(to, &v, sizeof v);
}

template <typename A>
CTXOPS_INLINE void store_vector(A* to, Vector<A> v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = v[i];
}

template <typename A>
CTXOPS_INLINE bool is_aligned(const A* address) {
  return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0;
}

// Asks for what is needed soon, but not at once: for the second cache. The processor looks ahead by
// itself, but not beyond a page.
template <typename A>
CTXOPS_INLINE void fetch(const A* from, int64_t count) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A));
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

// Of results of more bytes than this the caches keep nothing.
constexpr int64_t kCache = 32 << 20;

// Stores to an aligned address past the caches; stream_fence() makes it visible to other threads.
template <typename A>
CTXOPS_INLINE void stream_vector(A* to, Vector<A> v) {
#if defined(__AVX512F__)
  __m512i bits;
  memcpy(&bits, &v, sizeof v);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
#elif defined(__AVX2__)
  __m256i bits;
  memcpy(&bits, &v, sizeof v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
#elif defined(__SSE2__)
  __m128i bits;
  memcpy(&bits, &v, sizeof v);
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), bits);
#else
  store_vector<A>(to, v);
#endif
}

CTXOPS_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Lane l of the sum of halves: a vector of groups of kWidth lanes, and another one, become one of
// groups of half the width, each the sum of a group's two halves.
template <int kWidth, int kHalf>
constexpr int folded_lane(int lane) {
  return lane / (kWidth / 2) * kWidth + lane % (kWidth / 2) + kHalf * (kWidth / 2);
}

template <int kWidth, typename V, int... kLane>
CTXOPS_INLINE V fold(V a, V b, std::integer_sequence<int, kLane...>) {
  return CTXOPS_SHUFFLE(a, b, folded_lane<kWidth, 0>(kLane)) +
         CTXOPS_SHUFFLE(a, b, folded_lane<kWidth, 1>(kLane));
}

// Lane l holds the sum of vector kFirst + l of `vectors`; past kCount, 0. kSpan: a power of two.
template <typename A, int kCount, int kFirst, int kSpan>
CTXOPS_INLINE Vector<A> sums(const Vector<A>* vectors) {
  if constexpr (kFirst >= kCount) {
    return Vector<A>{};
  } else if constexpr (kSpan == 1) {
    return vectors[kFirst];
  } else {
    constexpr int kHalf = kSpan / 2;
    return fold<kLanes<A> / kHalf>(sums<A, kCount, kFirst, kHalf>(vectors),
                                   sums<A, kCount, kFirst + kHalf, kHalf>(vectors),
                                   std::make_integer_sequence<int, kLanes<A>>{});
  }
}

// to[i] = the sum of the lanes of vectors[i] times factor; writes whole vectors, up to kLanes - 1
// values past kCount.
template <typename A, int kCount, int kFirst = 0>
CTXOPS_INLINE void store_sums(A* to, const Vector<A>* vectors, A factor) {
  store_vector<A>(to + kFirst, sums<A, kCount, kFirst, kLanes<A>>(vectors) * factor);
  if constexpr (kFirst + kLanes<A> < kCount) {
    store_sums<A, kCount, kFirst + kLanes<A>>(to, vectors, factor);
  }
}

// Lane l is lane l + kShift of v, around the end.
template <int kShift, typename V, int... kLane>
CTXOPS_INLINE V rotate(V v, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  return CTXOPS_SHUFFLE(v, v, (kLane + kShift) % kCount);
}

// Combines all lanes whose numbers are equal modulo kPeriod, a power of two: every lane gets the
// result of its own.
template <int kPeriod, typename A, typename F>
CTXOPS_INLINE Vector<A> reduce_lanes(Vector<A> v, const F& combine) {
  constexpr std::make_integer_sequence<int, kLanes<A>> lanes{};
  if constexpr (kLanes<A> > 8 && kPeriod < 16) v = combine(v, rotate<8>(v, lanes));
  if constexpr (kLanes<A> > 4 && kPeriod < 8) v = combine(v, rotate<4>(v, lanes));
  if constexpr (kLanes<A> > 2 && kPeriod < 4) v = combine(v, rotate<2>(v, lanes));
  if constexpr (kLanes<A> > 1 && kPeriod < 2) v = combine(v, rotate<1>(v, lanes));
  return v;
}

// exp(x) for x <= 0, at most 2 units in the last place off; 0 below -87. NaN stays. 2^n times a
// polynomial, n by its bits: nothing is converted to an integer.
CTXOPS_INLINE Vector<float> exp_nonpositive(Vector<float> x) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector<float> shifted = x * 1.44269504088896341f + kRound;
  const Vector<float> n = shifted - kRound;
  Vector<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  Bits bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  Vector<float> power;
  memcpy(&power, &bits, sizeof power);
  return x < -87.f ? Vector<float>{} : p * power;
}

CTXOPS_INLINE Vector<double> exp_nonpositive(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace
}  // namespace ctxops
