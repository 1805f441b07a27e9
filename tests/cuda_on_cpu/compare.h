// SPDX-License-Identifier: Apache-2.0
// Tensors for the programs that hold a CUDA kernel against its CPU twin: random, with memory that
// ends where the tensor ends, and poisoned where nothing was written.
//
// Without CTXOPS_CUDA_ON_CPU the kernels run on a GPU: host and device then share the memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#if defined(CTXOPS_CUDA_ON_CPU)
#include "common/cuda.h"
#else
#include <cuda_runtime.h>
#endif

#include "common/dtype.h"
#include "common/kernel.h"
#include "common/tensor.h"

namespace compare {

using ctxops::DType;
using ctxops::Stream;
using ctxops::TensorView;
using ctxops::Threads;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

#if defined(CTXOPS_CUDA_ON_CPU)
using Memory = std::vector<unsigned char>;
inline void finish() {}
#else
// Waits for the kernels, or fails as they did.
inline void finish() {
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) fail(cudaGetErrorString(error));
}

// An allocation for each tensor, whose bounds memcheck knows.
template <typename T>
struct SharedByBoth {
  using value_type = T;
  T* allocate(size_t count) {
    void* memory = nullptr;
    const cudaError_t error = cudaMallocManaged(&memory, count * sizeof(T));
    if (error != cudaSuccess) fail(cudaGetErrorString(error));
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { cudaFree(memory); }
  bool operator==(const SharedByBoth&) const { return true; }
  bool operator!=(const SharedByBoth&) const { return false; }
};
using Memory = std::vector<unsigned char, SharedByBoth<unsigned char>>;
#endif

inline DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float64") return DType::float64;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  fail("no dtype " + name);
}

inline size_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64: return 8;
    case DType::float32:
    case DType::int32: return 4;
    case DType::uint8:
    case DType::int8: return 1;
    default: return 2;
  }
}

// Distance of neighbouring numbers near 1.
inline double epsilon(DType dtype) {
  switch (dtype) {
    case DType::float64: return std::ldexp(1.0, -52);
    case DType::float32: return std::ldexp(1.0, -23);
    case DType::float16: return std::ldexp(1.0, -10);
    case DType::bfloat16: return std::ldexp(1.0, -7);
    default: return 0;
  }
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  int64_t below(int64_t n) { return bits() % n; }
  double in_unit() { return bits() / std::ldexp(1.0, 30) - 1; }  // -1 ... 1

 private:
  uint64_t state_;
};

// How the elements of a tensor lie: its dimensions from the innermost to the outermost, elements
// left free behind each of them, and before the first.
struct Layout {
  std::vector<int> order;
  std::vector<int64_t> gap;
  int64_t offset = 0;
};

inline Layout row_major(int ndim) {
  Layout layout;
  for (int i = ndim - 1; i >= 0; --i) layout.order.push_back(i);
  layout.gap.assign(ndim, 0);
  return layout;
}

class Tensor {
 public:
  Tensor(DType dtype, const std::vector<int64_t>& sizes, const Layout& layout) {
    view_.ndim = static_cast<int32_t>(sizes.size());
    view_.dtype = dtype;
    view_.cuda_device = 0;
    int64_t stride = 1, last = 0, elements = 1;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const int dim = layout.order[i];
      view_.size[dim] = sizes[dim];
      view_.stride[dim] = sizes[dim] > 1 ? stride : 0;
      last += (sizes[dim] - 1) * view_.stride[dim];
      elements *= sizes[dim];
      stride = stride * sizes[dim] + layout.gap[i];
    }
    offset_ = layout.offset;
    const int64_t stored = elements == 0 ? 0 : offset_ + last + 1;
    memory_.assign(stored * bytes_of(dtype), 0xff);
    memory_.shrink_to_fit();
  }
  Tensor(DType dtype, const std::vector<int64_t>& sizes)
      : Tensor(dtype, sizes, row_major(static_cast<int>(sizes.size()))) {}

  TensorView view() {
    view_.data = memory_.data() + offset_ * bytes_of(view_.dtype);
    return view_;
  }
  int64_t stored() const { return static_cast<int64_t>(memory_.size() / bytes_of(view_.dtype)); }
  DType dtype() const { return view_.dtype; }

  // Element i of the memory, gaps included.
  double get(int64_t i) const {
    const unsigned char* from = memory_.data() + i * bytes_of(view_.dtype);
    switch (view_.dtype) {
      case DType::float64: return as<double>(from);
      case DType::float32: return as<float>(from);
      case DType::float16: return ctxops::load(as<ctxops::Half>(from));
      case DType::bfloat16: return ctxops::load(as<ctxops::BFloat16>(from));
      case DType::uint8: return as<uint8_t>(from);
      case DType::int8: return as<int8_t>(from);
      case DType::int16: return as<int16_t>(from);
      case DType::int64: return static_cast<double>(as<int64_t>(from));
      default: return as<int32_t>(from);
    }
  }
  void set(int64_t i, double x) {
    unsigned char* to = memory_.data() + i * bytes_of(view_.dtype);
    if (ctxops::is_integer(view_.dtype)) {  // the low bytes, as the machine is little-endian
      const int64_t value = static_cast<int64_t>(x);
      std::memcpy(to, &value, bytes_of(view_.dtype));
      return;
    }
    ctxops::dispatch_floating(view_.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      T value;
      ctxops::store(&value, static_cast<ctxops::Accumulator<T>>(x));
      std::memcpy(to, &value, sizeof value);
    });
  }

  template <typename F>
  void fill(const F& value) {
    for (int64_t i = 0; i < stored(); ++i) set(i, value());
  }

  // The same values and layout in another floating dtype.
  Tensor to(DType dtype) const {
    Tensor converted = *this;
    converted.view_.dtype = dtype;
    converted.memory_.assign(stored() * bytes_of(dtype), 0xff);
    for (int64_t i = 0; i < stored(); ++i) converted.set(i, get(i));
    return converted;
  }

  bool same_bits(const Tensor& other) const { return memory_ == other.memory_; }

 private:
  template <typename T>
  static T as(const unsigned char* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }

  TensorView view_ = {};
  int64_t offset_ = 0;
  Memory memory_;
};

// Fails unless |expected - actual| <= relative * |expected| + absolute everywhere, in the gaps too;
// NaN equals NaN, an infinity itself.
inline void expect_close(const std::string& what, const Tensor& expected, const Tensor& actual,
                         double relative, double absolute) {
  for (int64_t i = 0; i < expected.stored(); ++i) {
    const double a = expected.get(i), b = actual.get(i);
    if (a == b || (a != a && b != b)) continue;
    if (std::fabs(a - b) <= relative * std::fabs(a) + absolute && std::isfinite(a)) continue;
    fail(what + ": element " + std::to_string(i) + " of the memory is " + std::to_string(b) +
         ", expected " + std::to_string(a));
  }
}

inline void expect_equal(const std::string& what, const Tensor& expected, const Tensor& actual) {
  expect_close(what, expected, actual, 0, 0);
}

inline void expect_same_bits(const std::string& what, const Tensor& one, const Tensor& other) {
  if (!one.same_bits(other)) fail(what + ": the order of the threads changes the result");
}

inline void set_order(bool ascending) {
#if defined(CTXOPS_CUDA_ON_CPU)
  using cuda_on_cpu::Order;
  if (ascending) cuda_on_cpu::settings = {Order::ascending, INT32_MAX};
  if (!ascending) cuda_on_cpu::settings = {Order::descending, 3};
#else
  (void)ascending;
#endif
}

// Calls f with the usual order of threads and with the other one on a grid of a few blocks; on a
// GPU, which has its own order, twice.
template <typename F>
auto in_both_orders(const F& f) {
  set_order(true);
  auto ascending = f();
  set_order(false);
  auto descending = f();
  finish();
  return std::make_pair(std::move(ascending), std::move(descending));
}

inline TensorView on_device(int32_t device, Tensor& tensor) {
  TensorView view = tensor.view();
  view.cuda_device = device;
  return view;
}

// Kernels run on the device of the tensors, which is the current one, and on the stream that they
// are given.
inline void expect_launched(const std::string& what, const char* error, int device, Stream stream) {
  if (error != nullptr) fail(what + ": " + error);
  finish();
#if defined(CTXOPS_CUDA_ON_CPU)
  if (cuda_on_cpu::last_launch.device != device) fail(what + " ran on another device");
  if (reinterpret_cast<intptr_t>(cuda_on_cpu::last_launch.stream) != stream.handle) {
    fail(what + " ran on another stream");
  }
  if (cuda_on_cpu::current_device != device) fail(what + " changed the current device");
#else
  (void)device, (void)stream;
#endif
}

}  // namespace compare
