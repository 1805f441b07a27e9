// SPDX-License-Identifier: Apache-2.0
// The threads of a warp, and what all of them reduce together.
#pragma once

#include <cstdint>

#include "common/cuda.h"

namespace ctxops {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }

// So many lanes of a warp lie side by side on the channels, which leaves the others for other work.
// A power of two.
__host__ __device__ inline int lanes_on(int64_t channels, int per_lane) {
  int lanes = 1;
  while (lanes < kWarp && lanes * per_lane < channels) lanes *= 2;
  return lanes;
}

template <typename T>
__device__ T warp_sum(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

__device__ inline int32_t warp_min(int32_t x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const int32_t other = __shfl_xor_sync(kAllLanes, x, lanes);
    x = other < x ? other : x;
  }
  return x;
}

// Of floating numbers; a NaN counts for nothing unless all are NaN.
template <typename A>
__device__ A warp_max(A x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x = fmax(x, __shfl_xor_sync(kAllLanes, x, lanes));
  }
  return x;
}

}  // namespace
}  // namespace cuda
}  // namespace ctxops
