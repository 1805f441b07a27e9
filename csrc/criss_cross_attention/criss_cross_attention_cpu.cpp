// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"
#include "common/transpose.h"
#include "criss_cross_attention/criss_cross_attention.h"

namespace ctxops {
namespace CTXOPS_ISA {
namespace {

struct Problem {
  TensorView input, output;
  int64_t height, width;  // of a matrix of the input
};

// The rows from `top` on, a strip or what is left of one.
template <typename T>
void turn(const Problem& p, int64_t channel, int64_t top) {
  const int64_t from_stride = p.input.stride[1], to_stride = p.output.stride[1];
  const T* from =
      static_cast<const T*>(p.input.data) + channel * p.input.stride[0] + top * from_stride;
  T* to = static_cast<T*>(p.output.data) + channel * p.output.stride[0] + top;
  const int64_t height = smaller(kLanes<T>, p.height - top);
  if (height == kLanes<T>) return turn_strip<T>(from, from_stride, to, to_stride, p.width);
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < p.width; ++j) {
      to[j * to_stride + i] = from[i * from_stride + j];
    }
  }
}

template <typename T>
const char* turn_all(const CrissCrossAttentionTurn& params, Threads threads) {
  const Problem p{params.input, params.output, params.input.size[1], params.input.size[2]};
  const int64_t strips = (p.height + kLanes<T> - 1) / kLanes<T>;
  parallel_for(p.input.size[0] * strips, element_count(p.input), threads, [&](int64_t item) {
    const int64_t channel = item / strips, top = item % strips * kLanes<T>;
    turn<T>(p, channel, top);
  });
  return nullptr;
}

}  // namespace

const char* criss_cross_attention_turn(const CrissCrossAttentionTurn& params, Threads threads) {
  if (const char* error = params.check()) return error;
  if (params.empty()) return nullptr;
  switch (params.input.dtype) {
    case DType::float32: return turn_all<float>(params, threads);
    case DType::float64: return turn_all<double>(params, threads);
    default: return "input must be float32 or float64";
  }
}

}  // namespace CTXOPS_ISA
}  // namespace ctxops
