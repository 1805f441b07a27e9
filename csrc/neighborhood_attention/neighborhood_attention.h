// SPDX-License-Identifier: Apache-2.0
// neighborhood_attention: every position attends to a dilated window of kh x kw neighbours.
//
//   logits_n  = scale * <query, key_n>        weights = softmax over the window
//   output    = sum_n weights_n value_n       n = i * kw + j, row i and column j of the window
//
// A neighbour outside the map has logit 0 and value 0 (zeros), or takes no part (mask); or the
// window slides inside the map in steps of the dilation (shift). See common/window.h.
//
//   B, H, W   the map                          C, Cv   channels of query and key, of value
//   heads     the channels' equal groups       K       kh * kw
#pragma once

#include "common/dtype.h"
#include "common/tensor.h"
#include "common/window.h"

// query, key  (B, C, H, W), unit stride along C
// value       (B, Cv, H, W), unit stride along C; without elements: only the weights are wanted
// output      as value
// weights     (B, heads, K, H, W) accumulator, any strides; without elements: not wanted
// window      kh, kw, dilation along H, dilation along W
CTXOPS_DECLARE_KERNEL(neighborhood_attention_forward, const TensorView& query,
                      const TensorView& key, const TensorView& value, const TensorView& output,
                      const TensorView& weights, const IntList& window, int64_t heads, double scale,
                      int64_t border, int64_t executor)

// grad         (B, Cv, H, W), unit stride along C: of the output
// weights      (B, heads, K, H, W) accumulator, any strides: as the forward saved them
// grad_logits  like weights, with the same strides: workspace
// grad_query, grad_key, grad_value  as query, key and value
CTXOPS_DECLARE_KERNEL(neighborhood_attention_backward, const TensorView& grad,
                      const TensorView& query, const TensorView& key, const TensorView& value,
                      const TensorView& weights, const TensorView& grad_logits,
                      const TensorView& grad_query, const TensorView& grad_key,
                      const TensorView& grad_value, const IntList& window, int64_t heads,
                      double scale, int64_t border, int64_t executor)

namespace ctxops {
namespace {

// The most neighbours of a window: a thread keeps the logits of a few queries.
constexpr int64_t kMaxWindow = 4096;

struct Window {
  WindowAxis rows, columns;
};

inline Window make_window(const TensorView& map, const IntList& window, int64_t border) {
  const Border b = static_cast<Border>(border);
  return {{map.size[2], window.value[0], window.value[2], b},
          {map.size[3], window.value[1], window.value[3], b}};
}

inline bool fits(const WindowAxis& axis) {
  if (axis.border != Border::shift) return true;
  // The class of the last position has the fewest steps, unless the dilation leaves classes empty.
  const int64_t last = axis.extent < axis.dilation ? axis.extent - 1 : axis.dilation - 1;
  return class_steps(axis, last) >= axis.kernel;
}

// Is `view` a map (B, channels, H, W) like `map`, with unit stride along C?
inline bool is_map(const TensorView& view, const TensorView& map, int64_t channels) {
  return view.ndim == 4 && view.dtype == map.dtype && view.size[0] == map.size[0] &&
         view.size[1] == channels && view.size[2] == map.size[2] && view.size[3] == map.size[3] &&
         view.cuda_device == map.cuda_device && unit_stride(view, 1);
}

inline bool is_weights(const TensorView& view, const TensorView& map, int64_t heads, int64_t K) {
  return view.ndim == 5 && view.dtype == accumulator_dtype(map.dtype) &&
         view.size[0] == map.size[0] && view.size[1] == heads && view.size[2] == K &&
         view.size[3] == map.size[2] && view.size[4] == map.size[3] &&
         view.cuda_device == map.cuda_device;
}

inline const char* check_window(const TensorView& query, const IntList& window, int64_t heads,
                                int64_t border) {
  if (query.ndim != 4 || !is_floating(query.dtype)) return "query must be a floating (B, C, H, W)";
  if (query.size[2] < 1 || query.size[3] < 1) return "the map must have H, W >= 1";
  if (heads < 1 || query.size[1] % heads != 0) return "heads must divide the channels";
  if (border < 0 || border > static_cast<int64_t>(Border::shift)) return "unknown border";
  if (window.count != 4) return "window must be kh, kw, and two dilations";
  for (int i = 0; i < 4; ++i) {
    if (window.value[i] < 1 || window.value[i] > INT32_MAX) return "window must be in 1 ... 2^31-1";
  }
  if (window.value[0] > kMaxWindow / window.value[1]) return "the window is too large";
  const Window w = make_window(query, window, border);
  return fits(w.rows) && fits(w.columns) ? nullptr : "the map is too small to shift the window";
}

inline const char* check_forward(const TensorView& query, const TensorView& key,
                                 const TensorView& value, const TensorView& output,
                                 const TensorView& weights, const IntList& window, int64_t heads,
                                 int64_t border) {
  if (const char* error = check_window(query, window, heads, border)) return error;
  if (!is_map(query, query, query.size[1])) return "query needs unit stride along C";
  if (!is_map(key, query, query.size[1])) return "key must be a map like query";
  const bool weighs = element_count(weights) > 0;
  if (weighs && !is_weights(weights, query, heads, window.value[0] * window.value[1])) {
    return "weights must be (B, heads, kh * kw, H, W) in the accumulator's dtype";
  }
  if (element_count(value) == 0) return weighs ? nullptr : "neither values nor weights";
  if (value.ndim != 4 || value.size[1] % heads != 0)
    return "heads must divide the value's channels";
  if (!is_map(value, query, value.size[1])) return "value must be a map like query";
  return is_map(output, query, value.size[1]) ? nullptr : "output must be a map like value";
}

inline const char* check_backward(const TensorView& grad, const TensorView& query,
                                  const TensorView& key, const TensorView& value,
                                  const TensorView& weights, const TensorView& grad_logits,
                                  const TensorView& grad_query, const TensorView& grad_key,
                                  const TensorView& grad_value, const IntList& window,
                                  int64_t heads, int64_t border) {
  if (const char* error = check_forward(query, key, value, grad, weights, window, heads, border)) {
    return error;
  }
  if (element_count(value) == 0) return "value has no elements";
  if (!is_weights(grad_logits, query, heads, window.value[0] * window.value[1])) {
    return "grad_logits must be like weights";
  }
  for (int i = 0; i < 5; ++i) {
    if (grad_logits.stride[i] != weights.stride[i]) return "grad_logits must be like weights";
  }
  if (!is_weights(weights, query, heads, window.value[0] * window.value[1])) {
    return "weights must be (B, heads, kh * kw, H, W) in the accumulator's dtype";
  }
  const bool good = is_map(grad_query, query, query.size[1]) &&
                    is_map(grad_key, query, query.size[1]) &&
                    is_map(grad_value, query, value.size[1]);
  return good ? nullptr : "the gradients must be maps like query, key and value";
}

}  // namespace
}  // namespace ctxops
