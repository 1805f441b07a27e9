// SPDX-License-Identifier: Apache-2.0
// What a .cu file needs of the CUDA runtime. With CTXOPS_CUDA_ON_CPU the same file compiles for the
// host, where the tests run it under sanitizers.
#pragma once

#include <cstdint>

#include "common/kernel.h"

#if defined(CTXOPS_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...): nullptr, or the text of its error.
#define CTXOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)   \
  ([&]() -> const char* {                                               \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    return ::ctxops::error_text(cudaGetLastError());                    \
  }())

// T name[count] in the memory that the threads of a block share.
#define CTXOPS_SHARED(T, name, count) __shared__ T name[count]

// T* name: the shared_bytes of the launch.
#define CTXOPS_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char ctxops_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(ctxops_dynamic_shared)

#define CTXOPS_LARGEST_GRID INT32_MAX

namespace ctxops {
namespace {

// Copies 8 or 16 aligned bytes from device memory to shared memory while the thread goes on. Copies
// form a group at each copy_commit(); copy_wait<n>() waits for all of the thread's groups but the
// last n. Other threads see them after a barrier.
template <int kBytes>
__device__ void copy_async(void* to, const void* from) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes)
               : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

}  // namespace
}  // namespace ctxops
#endif

namespace ctxops {
namespace {

inline const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// f(Tag<T>{}, stream) as dispatch() calls it. Python makes the device of the tensors the current
// one: to set it here and to set the former one again would make a context on a device that has
// none.
template <typename Params, typename F>
const char* dispatch(const Params& params, Stream stream, const F& f) {
  return dispatch(params, [&](auto tag) -> const char* {
    int current = 0;
    if (const char* error = error_text(cudaGetDevice(&current))) {
      cudaGetLastError();  // or the next launch would report it once more
      return error;
    }
    if (current != params.like().cuda_device) return "the tensors' device is not the current one";
    return f(tag, reinterpret_cast<cudaStream_t>(stream.handle));
  });
}

// The x of a grid; a kernel walks over its blocks' work in strides of gridDim.x.
inline unsigned grid_size(int64_t blocks) {
  return static_cast<unsigned>(blocks < CTXOPS_LARGEST_GRID ? blocks : CTXOPS_LARGEST_GRID);
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace ctxops
