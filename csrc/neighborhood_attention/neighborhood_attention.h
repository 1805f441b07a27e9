// SPDX-License-Identifier: Apache-2.0
// neighborhood_attention: every position attends to a dilated window of kh x kw neighbours.
//
//   logits_n  = scale * <query, key_n> + bias of the steps from the query to n
//   weights   = softmax over the window
//   output    = sum_n weights_n value_n       n = i * kw + j, row i and column j of the window
//
// A neighbour outside the map has logit 0, without bias, and value 0 (zeros), or takes no part
// (mask); or the window slides inside the map in steps of the dilation (shift). See
// common/window.h.
//
//   B, H, W   the map                          C, Cv   channels of query and key, of value
//   heads     the channels' equal groups       K       kh * kw
#pragma once

#include "common/dtype.h"
#include "common/kernel.h"
#include "common/tensor.h"
#include "common/window.h"

CTXOPS_DECLARE_KERNEL(neighborhood_attention_forward, NeighborhoodAttentionForward)
CTXOPS_DECLARE_KERNEL(neighborhood_attention_backward, NeighborhoodAttentionBackward)
// What these two call on the CPU where inner_dimension() is W.
CTXOPS_DECLARE_KERNEL(neighborhood_attention_forward_along_columns, NeighborhoodAttentionForward)
CTXOPS_DECLARE_KERNEL(neighborhood_attention_backward_along_columns, NeighborhoodAttentionBackward)

namespace ctxops {

struct NeighborhoodAttentionForward {
  TensorView query;    // (B, C, H, W), unit stride along C, and so all maps; or all along W, as
                       // inner_dimension() says
  TensorView key;      // likewise
  TensorView value;    // (B, Cv, H, W), likewise; without elements: only the weights are wanted
  TensorView output;   // as value
  TensorView weights;  // (B, heads, K, H, W) accumulator, any strides; without elements: not wanted
  IntList kernel_size;  // kh, kw
  IntList dilation;     // along H, along W
  double scale;
  Border border;
  int64_t num_heads;
  TensorView bias;  // (heads, 2 * kh - 1, 2 * kw - 1) accumulator, contiguous: by the steps to the
                    // neighbour plus kh - 1 and kw - 1; without elements: none

  CTXOPS_MEMBERS(query, key, value, output, weights, kernel_size, dilation, scale, border,
                 num_heads, bias);
  CTXOPS_INLINE const TensorView& like() const { return query; }
  CTXOPS_INLINE bool empty() const { return element_count(query) == 0; }
  const char* check() const;
};

struct NeighborhoodAttentionBackward {
  TensorView grad;   // (B, Cv, H, W), of the output: unit stride as in the forward
  TensorView query;  // as the forward took it, and so key and value
  TensorView key;
  TensorView value;
  TensorView weights;  // (B, heads, K, H, W) accumulator, any strides: as the forward saved them
  TensorView grad_logits;  // like weights, with the same strides: workspace, of the logits
  TensorView grad_query;   // as query
  TensorView grad_key;     // as key
  TensorView grad_value;   // as value
  IntList kernel_size;     // this and all below as in the forward
  IntList dilation;
  double scale;
  Border border;
  int64_t num_heads;
  TensorView grad_bias;  // like bias; without elements: not wanted

  CTXOPS_MEMBERS(grad, query, key, value, weights, grad_logits, grad_query, grad_key, grad_value,
                 kernel_size, dilation, scale, border, num_heads, grad_bias);
  CTXOPS_INLINE const TensorView& like() const { return query; }
  CTXOPS_INLINE bool empty() const { return element_count(query) == 0; }
  const char* check() const;
};

namespace {

// The most neighbours of a window: a thread keeps the logits of a few queries.
constexpr int64_t kMaxWindow = 4096;

// And where the CPU's vectors run along the columns: a thread keeps those of a vector of queries.
// Of larger windows that slide inside the map, too little fits into the inner caches: with the
// backward 7 x 7 takes 1.2 times as long as along the channels with the maps laid out anew.
constexpr int64_t kMaxWindowAlongColumns = 2048;
constexpr int64_t kMaxSlidingWindowAlongColumns = 32;

struct Window {
  WindowAxis rows, columns;
};

template <typename Params>
Window window_of(const Params& p) {
  return {{p.query.size[2], p.kernel_size.value[0], p.dilation.value[0], p.border},
          {p.query.size[3], p.kernel_size.value[1], p.dilation.value[1], p.border}};
}

inline bool fits(const WindowAxis& axis) {
  if (axis.border != Border::shift) return true;
  // The class of the last position has the fewest steps, unless the dilation leaves classes empty.
  const int64_t last = axis.extent < axis.dilation ? axis.extent - 1 : axis.dilation - 1;
  return class_steps(axis, last) >= axis.kernel;
}

// The dimension along which all maps need unit stride. The CPU has two bodies: where the query's
// channels do not lie side by side, as in contiguous maps, vectors run along the columns.
template <typename Params>
int inner_dimension(const Params& p) {
  const int64_t most =
      p.border == Border::shift ? kMaxSlidingWindowAlongColumns : kMaxWindowAlongColumns;
  const bool fits = p.kernel_size.value[0] * p.kernel_size.value[1] <= most;
  return p.query.cuda_device < 0 && !unit_stride(p.query, 1) && fits ? 3 : 1;
}

// Is `view` a map (B, channels, H, W) like `map`, with unit stride along dimension `inner`?
inline bool is_map(const TensorView& view, const TensorView& map, int64_t channels, int inner) {
  return view.ndim == 4 && view.dtype == map.dtype && view.size[0] == map.size[0] &&
         view.size[1] == channels && view.size[2] == map.size[2] && view.size[3] == map.size[3] &&
         view.cuda_device == map.cuda_device && unit_stride(view, inner);
}

inline bool is_weights(const TensorView& view, const TensorView& map, int64_t heads, int64_t K) {
  return view.ndim == 5 && view.dtype == accumulator_dtype(map.dtype) &&
         view.size[0] == map.size[0] && view.size[1] == heads && view.size[2] == K &&
         view.size[3] == map.size[2] && view.size[4] == map.size[3] &&
         view.cuda_device == map.cuda_device;
}

inline bool is_pair(const IntList& list) {
  if (list.count != 2) return false;
  for (int i = 0; i < 2; ++i) {
    if (list.value[i] < 1 || list.value[i] > INT32_MAX) return false;
  }
  return true;
}

inline const char* check_window(const NeighborhoodAttentionForward& p) {
  const TensorView& query = p.query;
  if (query.ndim != 4 || !is_floating(query.dtype)) return "query must be a floating (B, C, H, W)";
  if (query.size[2] < 1 || query.size[3] < 1) return "the map must have H, W >= 1";
  if (p.num_heads < 1 || query.size[1] % p.num_heads != 0) {
    return "num_heads must divide the channels";
  }
  if (!is_pair(p.kernel_size) || !is_pair(p.dilation)) {
    return "kernel_size and dilation must be two integers in 1 ... 2^31-1";
  }
  if (p.kernel_size.value[0] > kMaxWindow / p.kernel_size.value[1]) {
    return "the window is too large";
  }
  const Window window = window_of(p);
  return fits(window.rows) && fits(window.columns) ? nullptr
                                                   : "the map is too small to shift the window";
}

}  // namespace

CTXOPS_INLINE const char* NeighborhoodAttentionForward::check() const {
  if (const char* error = check_window(*this)) return error;
  const int inner = inner_dimension(*this);
  if (!is_map(query, query, query.size[1], inner)) return "query needs unit stride along C or W";
  if (!is_map(key, query, query.size[1], inner)) return "key must be a map like query";
  const bool weighs = element_count(weights) > 0;
  const int64_t neighbours = kernel_size.value[0] * kernel_size.value[1];
  if (weighs && !is_weights(weights, query, num_heads, neighbours)) {
    return "weights must be (B, heads, kh * kw, H, W) in the accumulator's dtype";
  }
  if (element_count(bias) > 0 &&
      !is_dense(bias, query, accumulator_dtype(query.dtype), num_heads,
                2 * kernel_size.value[0] - 1, 2 * kernel_size.value[1] - 1)) {
    return "bias must be a dense (heads, 2 * kh - 1, 2 * kw - 1) in the accumulator's dtype";
  }
  if (element_count(value) == 0) return weighs ? nullptr : "neither values nor weights";
  if (value.ndim != 4 || value.size[1] % num_heads != 0) {
    return "num_heads must divide the value's channels";
  }
  if (!is_map(value, query, value.size[1], inner)) return "value must be a map like query";
  const bool good = is_map(output, query, value.size[1], inner);
  return good ? nullptr : "output must be a map like value";
}

CTXOPS_INLINE const char* NeighborhoodAttentionBackward::check() const {
  const NeighborhoodAttentionForward forward{
      query, key, value, grad, weights, kernel_size, dilation, scale, border, num_heads, grad_bias};
  if (const char* error = forward.check()) return error;
  if (element_count(value) == 0) return "value has no elements";
  const int64_t neighbours = kernel_size.value[0] * kernel_size.value[1];
  if (!is_weights(grad_logits, query, num_heads, neighbours)) {
    return "grad_logits must be like weights";
  }
  for (int i = 0; i < 5; ++i) {
    if (grad_logits.stride[i] != weights.stride[i]) return "grad_logits must be like weights";
  }
  if (!is_weights(weights, query, num_heads, neighbours)) {
    return "weights must be (B, heads, kh * kw, H, W) in the accumulator's dtype";
  }
  const int inner = inner_dimension(*this);
  const bool good = is_map(grad_query, query, query.size[1], inner) &&
                    is_map(grad_key, query, query.size[1], inner) &&
                    is_map(grad_value, query, value.size[1], inner);
  return good ? nullptr : "the gradients must be maps like query, key and value";
}

}  // namespace ctxops
