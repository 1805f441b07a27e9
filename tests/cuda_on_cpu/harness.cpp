// SPDX-License-Identifier: Apache-2.0
// Kernels that use CUDA rightly and wrongly, to show that cuda_on_cpu.h tells them apart: runs the
// one that is named and prints what it wrote.
#include "common/cuda.h"

namespace {

constexpr int kBlock = 64;

__device__ float warp_sum(float x, uint32_t mask) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(mask, x, lanes);
  return x;
}

// One warp reduces, the other waits at the barrier of the block.
__global__ void sum_of_a_warp(float* y /* (kBlock,) */) {
  CTXOPS_SHARED(float, total, 1);
  if (threadIdx.x < 32) {
    const float sum = warp_sum(static_cast<float>(threadIdx.x), 0xffffffffu);
    if (threadIdx.x == 0) total[0] = sum;
  }
  __syncthreads();
  y[threadIdx.x] = total[0];
}

__global__ void one_barrier() { __syncthreads(); }

__global__ void half_a_warp(float* y /* (kBlock,) */) {
  float x = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 32 < 16) {
    x = __shfl_down_sync(0xffffu, x, 1);
  } else {
    x = __shfl_up_sync(0xffff0000u, x, 16);  // of lanes that the mask leaves out
    __syncwarp(0xffff0000u);
  }
  __syncwarp();
  y[threadIdx.x] = x;
}

__global__ void neighbour(float* y /* (kBlock,) */) {
  CTXOPS_DYNAMIC_SHARED(float, x);  // (kBlock,)
  x[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = x[(threadIdx.x + 1) % kBlock];
}

__global__ void missing_barrier(float* y /* (kBlock,) */) {
  CTXOPS_DYNAMIC_SHARED(float, x);  // (kBlock,)
  x[threadIdx.x] = static_cast<float>(threadIdx.x);
  y[threadIdx.x] = x[(threadIdx.x + 1) % kBlock];
}

__global__ void missing_warp_barrier(float* y /* (kBlock,) */) {
  CTXOPS_DYNAMIC_SHARED(float, x);  // (kBlock,)
  x[threadIdx.x] = static_cast<float>(threadIdx.x);
  y[threadIdx.x] = x[threadIdx.x ^ 1];
}

// Right where the lanes run in step, which nothing promises.
__global__ void shuffle_for_barrier(float* y /* (kBlock,) */) {
  CTXOPS_DYNAMIC_SHARED(float, x);  // (kBlock,)
  x[threadIdx.x] = static_cast<float>(threadIdx.x);
  const float mine = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
  y[threadIdx.x] = x[threadIdx.x ^ 1] - mine;
}

// The copy may arrive while others still read.
__global__ void copy_before_barrier(float* y /* (kBlock,) */) {
  CTXOPS_DYNAMIC_SHARED(float, x);  // (kBlock,)
  x[threadIdx.x] = 0;
  __syncthreads();
  y[threadIdx.x] = x[0];
  alignas(8) static const float zeros[2] = {};
  if (threadIdx.x == 0) ctxops::copy_async<8>(x, zeros);
  ctxops::copy_commit();
  __syncthreads();
  ctxops::copy_wait<0>();
}

__global__ void out_of_bounds(float* y /* (kBlock,) */) {
  CTXOPS_DYNAMIC_SHARED(float, x);  // (kBlock,)
  x[threadIdx.x + 1] = 0;
  __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void static_out_of_bounds(float* y /* (kBlock,) */) {
  CTXOPS_SHARED(float, x, kBlock - 1);
  x[threadIdx.x] = 0;
  __syncthreads();
  y[threadIdx.x] = x[0];
}

__global__ void early_return(float* y /* (kBlock,) */) {
  if (threadIdx.x >= 50) return;
  __syncthreads();
  y[threadIdx.x] = 0;
}

__global__ void absent_lanes(float* y /* (kBlock,) */) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void unnamed_lane(float* y /* (kBlock,) */) {
  y[threadIdx.x] = __shfl_xor_sync(0xfffffffeu, 1.0f, 1);
}

__global__ void barriers_of_two_kinds(float* y /* (kBlock,) */) {
  if (threadIdx.x == 0) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 0;
}

__global__ void two_barriers(float* y /* (kBlock,) */) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 0;
}

__global__ void device_memory(float* y /* (kBlock,) */) { y[threadIdx.x + 1] = 0; }

// After a barrier, to which the sanitizers must not lose what they know of the stacks.
__global__ void local_out_of_bounds(float* y /* (kBlock,) */) {
  float x[4] = {};
  __syncthreads();
  const float* from = x;
  y[threadIdx.x] = from[threadIdx.x % 5];
}

__global__ void undefined(float* y /* (kBlock,) */) {
  const int x = INT32_MAX - 40 + static_cast<int>(threadIdx.x);
  y[threadIdx.x] = static_cast<float>(x);
}

__global__ void misaligned(float* y /* (kBlock,) */) {
  const auto* x = reinterpret_cast<const char*>(y) + 1;
  y[threadIdx.x] = *reinterpret_cast<const float*>(x);
}

struct Named {
  const char* name;
  void (*kernel)(float*);
  unsigned grid;
};

const Named kKernels[] = {
    {"sum_of_a_warp", sum_of_a_warp, 2},
    {"half_a_warp", half_a_warp, 2},
    {"neighbour", neighbour, 2},
    {"missing_barrier", missing_barrier, 2},
    {"missing_warp_barrier", missing_warp_barrier, 1},
    {"shuffle_for_barrier", shuffle_for_barrier, 1},
    {"copy_before_barrier", copy_before_barrier, 1},
    {"out_of_bounds", out_of_bounds, 1},
    {"static_out_of_bounds", static_out_of_bounds, 1},
    {"early_return", early_return, 1},
    {"absent_lanes", absent_lanes, 1},
    {"unnamed_lane", unnamed_lane, 1},
    {"barriers_of_two_kinds", barriers_of_two_kinds, 1},
    {"two_barriers", two_barriers, 1},
    {"device_memory", device_memory, 1},
    {"undefined", undefined, 1},
    {"misaligned", misaligned, 1},
    {"empty_grid", neighbour, 0},
    {"local_out_of_bounds", local_out_of_bounds, 1},
};

}  // namespace

int main(int argc, char** argv) {
  for (const Named& named : kKernels) {
    if (argc != 2 || std::strcmp(named.name, argv[1]) != 0) continue;
    std::vector<float> y(kBlock, -1.0f);
    // The threads of this block have come to one barrier more than the others.
    CTXOPS_LAUNCH(one_barrier, 1, kBlock / 2, 0, cudaStream_t());
    const char* error = CTXOPS_LAUNCH(named.kernel, named.grid, kBlock, kBlock * sizeof(float),
                                      cudaStream_t(), y.data());
    if (error != nullptr) {
      std::fprintf(stderr, "%s\n", error);
      return 1;
    }
    for (const float value : y) std::printf("%g ", value);
    return 0;
  }
  return 2;
}
