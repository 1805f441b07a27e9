// SPDX-License-Identifier: Apache-2.0
// Rows into columns, in registers.
#pragma once

#include "common/simd.h"

namespace ctxops {
namespace {

// Lane l of the two vectors that exchange their halves of each group of 2 * kWidth lanes.
template <int kWidth, bool kUpper>
constexpr int exchanged_lane(int lane, int lanes) {
  const bool second = lane / kWidth % 2 == 1;
  return kUpper ? (second ? lane + lanes : lane + kWidth) : (second ? lane + lanes - kWidth : lane);
}

template <int kWidth, typename V, int... kLane>
CTXOPS_INLINE void exchange(V& a, V& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const V lower = CTXOPS_SHUFFLE(a, b, exchanged_lane<kWidth, false>(kLane, kCount));
  b = CTXOPS_SHUFFLE(a, b, exchanged_lane<kWidth, true>(kLane, kCount));
  a = lower;
}

// Transposes the matrix whose rows are so many vectors, by blocks of half of its size and less.
template <typename T, int kWidth = kLanes<T> / 2>
CTXOPS_INLINE void transpose(Vector<T>* rows) {
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & kWidth) continue;
    exchange<kWidth>(rows[i], rows[i + kWidth], std::make_integer_sequence<int, kLanes<T>>{});
  }
  if constexpr (kWidth > 1) transpose<T, kWidth / 2>(rows);
}

// to[j][i] = from[i][j] for i below kLanes and all j below width.
template <typename T>
void turn_strip(const T* __restrict from, int64_t from_stride, T* __restrict to, int64_t to_stride,
                int64_t width) {
  constexpr int kSide = kLanes<T>;
  int64_t left = 0;
  for (; left + kSide <= width; left += kSide) {
    Vector<T> rows[kSide];
    for (int i = 0; i < kSide; ++i) rows[i] = load_vector(from + i * from_stride + left);
    transpose<T>(rows);
    for (int j = 0; j < kSide; ++j) store_vector<T>(to + (left + j) * to_stride, rows[j]);
  }
  for (; left < width; ++left) {
    for (int i = 0; i < kSide; ++i) {
      to[left * to_stride + i] = from[i * from_stride + left];
    }
  }
}

}  // namespace
}  // namespace ctxops
