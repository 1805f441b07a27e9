// SPDX-License-Identifier: Apache-2.0
// A kernel entry is a function of every backend, or of those of the CPU where Triton serves CUDA,
// `const char* name(const Params&, Executor)`. It
// returns nullptr, or the text of what is wrong with its parameters or its launch.
//
// Params is a plain struct in <op>.h. Behind its members it has
//
//   CTXOPS_MEMBERS(input, ...);  // all members once more: Python hands them over by name
//   const TensorView& like();    // gives the device of all tensors, and the kernel's dtype
//   bool empty();                // have the results no elements?
//   const char* check();         // nullptr, or what is wrong with the members
//
// A struct cannot have internal linkage: what it has of functions is always inlined.
#pragma once

#include "common/dtype.h"
#include "common/tensor.h"

#define CTXOPS_DECLARE_KERNEL(name, Params) \
  namespace ctxops {                        \
  struct Params;                            \
  namespace baseline {                      \
  const char* name(const Params&, Threads); \
  }                                         \
  namespace avx2 {                          \
  const char* name(const Params&, Threads); \
  }                                         \
  namespace avx512 {                        \
  const char* name(const Params&, Threads); \
  }                                         \
  namespace cuda {                          \
  const char* name(const Params&, Stream);  \
  }                                         \
  }

// f(the members) and their names, "input, ...".
#define CTXOPS_MEMBERS(...) \
  template <typename F>     \
  void visit(const F& f) {  \
    f(__VA_ARGS__);         \
  }                         \
  static constexpr const char* kMembers = #__VA_ARGS__

namespace ctxops {

// What runs a kernel: so many threads on the CPU, a cudaStream_t on CUDA.
struct Threads {
  int64_t count = 1;
};
struct Stream {
  int64_t handle = 0;
};

namespace {

// f(Tag<T>{}) with the dtype of the parameters, if they are right and there is something to
// compute.
template <typename Params, typename F>
const char* dispatch(const Params& params, const F& f) {
  if (const char* error = params.check()) return error;
  if (params.empty()) return nullptr;
  return dispatch_floating(params.like().dtype, f);
}

}  // namespace
}  // namespace ctxops
