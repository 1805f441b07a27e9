// SPDX-License-Identifier: Apache-2.0
// Sums of the features of every class, seen at the labels' resolution: what both kernels share.
//
// A cell of the map is what lies between four positions, (y, x), (y, x + 1), (y + 1, x) and
// (y + 1, x + 1), or fewer at the last row and column; cell and upper left position have the same
// number. Every pixel of the labels lies in one cell: r, the resized map at the pixel, is a mean of
// the four vectors f with shares that are products of those along the two axes. So
//
//   <r, m>  = sum of shares * <f, m>           |r|^2 = sum of shares * shares * <f, f'>
//   sum over the pixels of a * r = sum over the positions of (sum over the pixels of a * share) * f
//
// with a = 1 - <r, m> / max(|r|, eps) for m of length 1. The last sum's coefficient is what the
// kernels gather for every position and the classes around it; all of it is summed in double.
// Along an axis on which the labels are as fine as the map a cell ends with its position: all other
// shares are 0, but 0 * NaN is not.
#pragma once

#include "common/bilinear.h"
#include "common/dtype.h"
#include "common/kernel.h"
#include "common/tensor.h"

CTXOPS_DECLARE_KERNEL(category_statistics, CategoryStatistics)

namespace ctxops {

// The rows of cells of all images, on CUDA the cells, are cut into P parts of about the same
// number.
struct CategoryStatistics {
  TensorView features;      // (B, C, h, w), floating; channels or columns side by side, on CUDA
                            // channels
  TensorView labels;        // (B, H, W), integers
  TensorView directions;    // (K, C) double: m / max(|m|, eps); without elements: a = 1
  TensorView sums;          // (K, C) accumulator: of a * r
  TensorView weights;       // (K,) accumulator: of a
  TensorView counts;        // (K,) int64: of pixels
  TensorView outside;       // (2,) int64: how many labels were neither in [0, K) nor ignored, and
                            // on the CPU the first of them; on CUDA, if there were any, sums and
                            // weights are NaN
  TensorView part_sums;     // (P, K, C) double, workspace
  TensorView part_weights;  // (P, K) double, workspace
  TensorView part_counts;   // (P, K) int64, workspace
  TensorView scratch;       // The CPU: (P, N, M) double, what a part keeps of a tile of N - 1 cells
                            // a row, N >= 2, M = scratch_of_position(...). CUDA: (B, H, W)
                            // accumulator, a of every pixel, where there are directions; else
                            // without elements
  int64_t ignore_index;
  bool align_corners;

  CTXOPS_MEMBERS(features, labels, directions, sums, weights, counts, outside, part_sums,
                 part_weights, part_counts, scratch, ignore_index, align_corners);
  CTXOPS_INLINE const TensorView& like() const { return features; }
  CTXOPS_INLINE bool empty() const { return element_count(sums) == 0; }
  const char* check() const;
};

namespace {

// Shorter vectors count as that long, as in torch's cosine_similarity.
constexpr double kShortest = 1e-8;

// Parts of M above: of the pixels of a row, and of a vector of features.
inline int64_t pixels_each(int64_t label_columns, int64_t positions) {
  return (label_columns + positions - 1) / positions;
}

inline int64_t doubles_of_vector(bool float64, int64_t channels) {
  return float64 ? channels : (channels + 1) / 2;
}

// M above, for N positions: what the CPU's Part takes.
inline int64_t scratch_of_position(bool float64, int64_t channels, int64_t classes,
                                   int64_t label_columns, int64_t positions) {
  return 2 * doubles_of_vector(float64, channels) + 6 * classes + 11 +
         2 * pixels_each(label_columns, positions);
}

// a of a pixel, of <r, m> / |r|. Where neighbours cancel, |r|^2 is a difference of far larger
// numbers and the quotient arbitrary; a cosine is not. Written so that NaN stays.
CTXOPS_HD double weight_of(double cosine) { return cosine > 1 ? 0 : cosine < -1 ? 2 : 1 - cosine; }

// How far it is from a position to the next one in its cell, if the map goes on.
CTXOPS_HD int64_t step_of(const ResizeAxis& axis) { return axis.from == axis.to ? 0 : 1; }

struct Span {
  int64_t begin, end;
};

// Which of so many rows of cells, counted through all images, are a part's; on CUDA, of the cells.
CTXOPS_HD Span span_of_part(int64_t part, int64_t parts, int64_t count) {
  return {part * count / parts, (part + 1) * count / parts};
}

}  // namespace

CTXOPS_INLINE const char* CategoryStatistics::check() const {
  if (features.ndim != 4 || !is_floating(features.dtype)) {
    return "features must be a floating (B, C, h, w)";
  }
  const int64_t channels = features.size[1];
  for (int i = 1; i < 4; ++i) {
    if (features.size[i] < 1) return "features must have C, h, w >= 1";
  }
  if (labels.ndim != 3 || !is_integer(labels.dtype) || labels.size[0] != features.size[0] ||
      labels.size[1] < 1 || labels.size[2] < 1 || labels.cuda_device != features.cuda_device) {
    return "labels must be integers (B, H, W) with H, W >= 1";
  }
  if (sums.ndim != 2 || sums.size[0] < 1) return "sums must be (K, C) with K >= 1";
  const int64_t classes = sums.size[0];
  const DType accumulator = accumulator_dtype(features.dtype);
  if (!is_dense(sums, features, accumulator, classes, channels) ||
      !is_dense(weights, features, accumulator, classes) ||
      !is_dense(counts, features, DType::int64, classes)) {
    return "sums (K, C), weights (K,) must be accumulators, counts (K,) int64";
  }
  if (element_count(directions) > 0 &&
      !is_dense(directions, features, DType::float64, classes, channels)) {
    return "directions must be (K, C) in double";
  }
  if (!is_dense(outside, features, DType::int64, 2)) return "outside must be (2,) in int64";
  const int64_t parts = part_counts.ndim == 2 ? part_counts.size[0] : 0;
  if (parts < 1 || !is_dense(part_sums, features, DType::float64, parts, classes, channels) ||
      !is_dense(part_weights, features, DType::float64, parts, classes) ||
      !is_dense(part_counts, features, DType::int64, parts, classes)) {
    return "the parts' sums must be (P, K, C) and (P, K), P >= 1";
  }
  const bool on_cuda = features.cuda_device >= 0;
  if (!unit_stride(features, 1) && (on_cuda || !unit_stride(features, 3))) {
    return "features must have their channels, or on the CPU their columns, side by side";
  }
  if (!on_cuda) {
    const int64_t positions = scratch.ndim == 3 ? scratch.size[1] : 0;
    if (positions < 2 || !is_dense(scratch, features, DType::float64, parts, positions,
                                   scratch_of_position(features.dtype == DType::float64, channels,
                                                       classes, labels.size[2], positions))) {
      return "on the CPU scratch must be (P, N, M) in double, N >= 2";
    }
    return nullptr;
  }
  for (int i = 0; i < 3; ++i) {
    if (labels.size[i] > INT32_MAX) return "on CUDA labels must have B, H, W below 2^31";
  }
  if (element_count(directions) > 0 &&
      !is_dense(scratch, features, accumulator, labels.size[0], labels.size[1], labels.size[2])) {
    return "on CUDA scratch must be (B, H, W), an accumulator";
  }
  return nullptr;
}

}  // namespace ctxops
