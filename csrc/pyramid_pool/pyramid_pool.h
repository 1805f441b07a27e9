// SPDX-License-Identifier: Apache-2.0
// pyramid_pool: every n x n grid of adaptive bins of a map, in one pass over the map.
//
// The boundaries of all bins of all grids cut the map into R x Q cells that no bin divides. The
// forward reduces each cell once, then each bin from its cells; the backward gathers for each cell
// what its bins send, then writes the gradient of the map.
//
//   B, C, H, W   the map                 S = sum of n * n   all bins, row-major, grid after grid
//   R, Q         rows, columns of cells  accumulator        float, or double for double
#pragma once

#include "common/bins.h"
#include "common/dtype.h"
#include "common/kernel.h"
#include "common/tensor.h"

CTXOPS_DECLARE_KERNEL(pyramid_pool_forward, PyramidPoolForward)
CTXOPS_DECLARE_KERNEL(pyramid_pool_backward, PyramidPoolBackward)

namespace ctxops {

struct PyramidPoolForward {
  TensorView input;        // (B, C, H, W), unit stride along C or along W
  TensorView output;       // (B, C, S)
  TensorView argmax;       // (B, S, C) int32: the position h * W + w of each maximum; without
                           // elements: not wanted
  TensorView cells;        // (B, R, Q, C) accumulator, workspace
  TensorView cell_argmax;  // (B, R, Q, C) int32, workspace; has elements exactly if argmax has
  IntList sizes;           // the n of each grid
  bool maximum;            // take the maximum of a bin, not its mean

  CTXOPS_MEMBERS(input, output, argmax, cells, cell_argmax, sizes, maximum);
  CTXOPS_INLINE const TensorView& like() const { return input; }
  CTXOPS_INLINE bool empty() const { return element_count(output) == 0; }
  const char* check() const;
};

struct PyramidPoolBackward {
  TensorView grad_output;  // (B, S, C), transposed by the caller
  TensorView argmax;       // (B, S, C) int32, or without elements: the forward took means
  TensorView grad_cells;   // (B, R, Q, C) accumulator, workspace; without elements for maxima
  TensorView grad_input;   // (B, C, H, W), unit stride along C or along W; on the CPU no half
                           // precision for maxima
  IntList sizes;           // the n of each grid

  CTXOPS_MEMBERS(grad_output, argmax, grad_cells, grad_input, sizes);
  CTXOPS_INLINE const TensorView& like() const { return grad_input; }
  CTXOPS_INLINE bool empty() const { return element_count(grad_input) == 0; }
  const char* check() const;
};

namespace {

// The cells along one axis. More boundaries than the table holds: every position is a cell.
constexpr int kMaxCells = 255;

struct CellAxis {
  int64_t extent;
  int64_t count;
  bool tabled;
  int32_t bound[kMaxCells + 1];
};

CTXOPS_HD int64_t cell_start(const CellAxis& axis, int64_t cell) {
  return axis.tabled ? axis.bound[cell] : cell;
}

// The cell that starts at `position`, which is a boundary; for any other, the cell that contains
// it.
CTXOPS_HD int64_t cell_at(const CellAxis& axis, int64_t position) {
  if (!axis.tabled) return position;
  int64_t low = 0, high = axis.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (axis.bound[middle] <= position) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return axis.bound[high] <= position ? high : low;
}

inline CellAxis make_cell_axis(int64_t extent, const IntList& sizes) {
  CellAxis axis;
  axis.extent = extent;
  axis.tabled = true;
  axis.bound[0] = 0;
  axis.count = 0;
  for (int64_t next = 0; next < extent; ++axis.count) {
    if (axis.count == kMaxCells) {
      axis.tabled = false;
      axis.count = extent;
      return axis;
    }
    const int64_t here = next;
    next = extent;
    for (int s = 0; s < sizes.count; ++s) {
      const int64_t n = sizes.value[s];
      // The nearest boundaries beyond `here` belong to the bins that hold it or to the one after.
      const int64_t last = last_bin(here, n, extent);
      for (int64_t i = first_bin(here, n, extent); i <= last + 1 && i < n; ++i) {
        const int64_t start = bin_start(i, n, extent), end = bin_end(i, n, extent);
        if (start > here && start < next) next = start;
        if (end > here && end < next) next = end;
      }
    }
    axis.bound[axis.count + 1] = static_cast<int32_t>(next);
  }
  return axis;
}

CTXOPS_HD int64_t grid_bins(const IntList& sizes) {
  int64_t bins = 0;
  for (int s = 0; s < sizes.count; ++s) bins += sizes.value[s] * sizes.value[s];
  return bins;
}

// Row i, column j of grid n: the bin number s counted over all grids.
struct Bin {
  int64_t n, i, j;
};

CTXOPS_HD Bin bin_at(const IntList& sizes, int64_t s) {
  int k = 0;
  while (s >= sizes.value[k] * sizes.value[k]) {
    s -= sizes.value[k] * sizes.value[k];
    ++k;
  }
  return {sizes.value[k], s / sizes.value[k], s % sizes.value[k]};
}

// Does (value, at) replace (best, best_at) as a maximum? NaN beats every number, and of equals the
// first position stays, so the result does not depend on the order in which positions are visited.
template <typename A>
CTXOPS_HD bool is_better(A value, int32_t at, A best, int32_t best_at) {
  const bool value_nan = value != value, best_nan = best != best;
  // Without branches, which nobody could predict.
  const bool equal = (value == best) | (value_nan & best_nan);
  return (equal & (at < best_at)) | (value > best) | (value_nan & !best_nan);
}

template <typename F>
CTXOPS_HD void for_bins_at(const IntList& sizes, int64_t height, int64_t width, int64_t h,
                           int64_t w, const F& f) {
  int64_t offset = 0;
  for (int k = 0; k < sizes.count; ++k) {
    const int64_t n = sizes.value[k];
    const int64_t last_row = last_bin(h, n, height), last_column = last_bin(w, n, width);
    for (int64_t i = first_bin(h, n, height); i <= last_row; ++i) {
      for (int64_t j = first_bin(w, n, width); j <= last_column; ++j) {
        const int64_t area = (bin_end(i, n, height) - bin_start(i, n, height)) *
                             (bin_end(j, n, width) - bin_start(j, n, width));
        f(offset + i * n + j, area);
      }
    }
    offset += n * n;
  }
}

inline const char* check_map(const TensorView& map, const IntList& sizes) {
  if (map.ndim != 4 || !is_floating(map.dtype)) return "the map must be a floating (B, C, H, W)";
  if (!unit_stride(map, 1) && !unit_stride(map, 3)) return "the map needs unit stride along C or W";
  if (map.size[2] < 1 || map.size[3] < 1) return "the map must have H, W >= 1";
  if (map.size[2] > (INT32_MAX - 1) / map.size[3]) return "the map has too many positions";
  if (sizes.count < 1) return "sizes is empty";
  for (int s = 0; s < sizes.count; ++s) {
    if (sizes.value[s] < 1 || sizes.value[s] > (1 << 15)) return "sizes must be in 1 ... 32768";
  }
  return nullptr;
}

}  // namespace

CTXOPS_INLINE const char* PyramidPoolForward::check() const {
  if (const char* error = check_map(input, sizes)) return error;
  const int64_t B = input.size[0], C = input.size[1], S = grid_bins(sizes);
  const int64_t R = make_cell_axis(input.size[2], sizes).count;
  const int64_t Q = make_cell_axis(input.size[3], sizes).count;
  if (!is_dense(output, input, input.dtype, B, C, S)) return "output must be (B, C, S) of the map";
  if (!is_dense(cells, input, accumulator_dtype(input.dtype), B, R, Q, C)) {
    return "cells must be (B, R, Q, C) in the accumulator's dtype";
  }
  if (element_count(argmax) == 0) return nullptr;
  if (!maximum) return "argmax is of use with maxima only";
  if (!is_dense(argmax, input, DType::int32, B, S, C)) return "argmax must be (B, S, C) int32";
  if (!is_dense(cell_argmax, input, DType::int32, B, R, Q, C)) {
    return "cell_argmax must be (B, R, Q, C) int32";
  }
  return nullptr;
}

CTXOPS_INLINE const char* PyramidPoolBackward::check() const {
  if (const char* error = check_map(grad_input, sizes)) return error;
  const int64_t B = grad_input.size[0], C = grad_input.size[1], S = grid_bins(sizes);
  const int64_t R = make_cell_axis(grad_input.size[2], sizes).count;
  const int64_t Q = make_cell_axis(grad_input.size[3], sizes).count;
  if (!is_dense(grad_output, grad_input, grad_input.dtype, B, S, C)) {
    return "grad_output must be (B, S, C) of the map";
  }
  if (element_count(argmax) == 0) {
    if (is_dense(grad_cells, grad_input, accumulator_dtype(grad_input.dtype), B, R, Q, C)) {
      return nullptr;
    }
    return "grad_cells must be (B, R, Q, C) in the accumulator's dtype";
  }
  return is_dense(argmax, grad_input, DType::int32, B, S, C) ? nullptr
                                                             : "argmax must be (B, S, C) int32";
}

}  // namespace ctxops
