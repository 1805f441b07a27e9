// SPDX-License-Identifier: Apache-2.0
// A tensor as the kernels see it: plain memory that somebody else owns and keeps alive.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CTXOPS_HD __host__ __device__ inline
#else
#define CTXOPS_HD inline
#endif

#define CTXOPS_INLINE inline __attribute__((always_inline))

namespace ctxops {

enum class DType : int32_t {
  other,
  float32,
  float64,
  float16,
  bfloat16,
  uint8,
  int8,
  int16,
  int32,
  int64
};

constexpr int kMaxDims = 5;

struct TensorView {
  void* data;
  int64_t size[kMaxDims];
  int64_t
      stride[kMaxDims];  // in elements; 0 where the size is 0 or 1: torch leaves those meaningless
  int32_t ndim;
  DType dtype;
  int32_t cuda_device;  // -1: memory of the host
};

// A few tensors.
constexpr int kMaxTensors = 8;

struct TensorList {
  int32_t count;
  TensorView value[kMaxTensors];
};

// A short list of integers that travels to a GPU by value.
constexpr int kMaxInts = 32;

struct IntList {
  int32_t count;
  int64_t value[kMaxInts];
};

// Everything below has internal linkage: a function shared by two instruction sets would be linked
// once, and the copy that stays may be one that this processor cannot run.
namespace {

CTXOPS_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

CTXOPS_HD int64_t element_count(const TensorView& view) {
  int64_t count = 1;
  for (int i = 0; i < view.ndim; ++i) count *= view.size[i];
  return count;
}

CTXOPS_HD bool unit_stride(const TensorView& view, int dim) {
  return view.size[dim] <= 1 || view.stride[dim] == 1;
}

CTXOPS_HD bool contiguous(const TensorView& view) {
  int64_t expected = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.size[i] > 1 && view.stride[i] != expected) return element_count(view) == 0;
    expected *= view.size[i];
  }
  return true;
}

// Is this a contiguous tensor of that dtype and shape, on the device of `like`?
template <typename... Sizes>
bool is_dense(const TensorView& view, const TensorView& like, DType dtype, Sizes... sizes) {
  const int64_t expected[] = {sizes...};
  if (view.ndim != static_cast<int>(sizeof...(sizes)) || view.dtype != dtype) return false;
  for (int i = 0; i < view.ndim; ++i) {
    if (view.size[i] != expected[i]) return false;
  }
  return view.cuda_device == like.cuda_device && contiguous(view);
}

}  // namespace
}  // namespace ctxops
