// SPDX-License-Identifier: Apache-2.0
// Bilinear interpolation along one axis, on the host and on the device: torch's, with sizes given.
#pragma once

#include "common/tensor.h"

namespace ctxops {
namespace {

struct ResizeAxis {
  int64_t from, to;  // positions of the source and of the target
  bool align_corners;
  double scale;    // positions of the source per position of the target,
  double inverse;  // and of the target per position of the source; 0 where there is only one
};

CTXOPS_HD ResizeAxis make_resize_axis(int64_t from, int64_t to, bool align_corners) {
  if (!align_corners) {
    return {from, to, false, static_cast<double>(from) / to, static_cast<double>(to) / from};
  }
  return {from, to, true, to > 1 ? static_cast<double>(from - 1) / (to - 1) : 0.0,
          from > 1 ? static_cast<double>(to - 1) / (from - 1) : 0.0};
}

// A target position is (1 - weight) * source[low] + weight * source[high].
struct Tap {
  // Equal at the last position, and where both sizes are: there the weight counts for nothing.
  int64_t low, high;
  double weight;
};

// Where a target position lies between the source's.
CTXOPS_HD double source_of(const ResizeAxis& axis, int64_t target) {
  const double x = axis.align_corners ? axis.scale * target : axis.scale * (target + 0.5) - 0.5;
  return x < 0 ? 0 : x;
}

CTXOPS_HD Tap tap_at(const ResizeAxis& axis, int64_t target) {
  const double x = source_of(axis, target);
  int64_t low = static_cast<int64_t>(x);
  if (low > axis.from - 1) low = axis.from - 1;  // the product may round up
  const bool last = low == axis.from - 1 || axis.from == axis.to;
  return {low, last ? low : low + 1, x - low};
}

// The share of source[position] in the target of a tap.
CTXOPS_HD double share_of(const Tap& tap, int64_t position) {
  const double low = tap.low == position ? 1 - tap.weight : 0;
  return low + (tap.high == position ? tap.weight : 0);
}

// The first target whose tap starts at `position` or behind it.
CTXOPS_HD int64_t first_target(const ResizeAxis& axis, int64_t position) {
  if (position <= 0) return 0;
  if (position >= axis.from) return axis.to;
  // source_of solved for the target, a step too small at most: of the sizes of tensors, which are
  // far below 2^50, no rounding reaches the target behind.
  const double x =
      axis.align_corners ? axis.inverse * position : axis.inverse * (position + 0.5) - 0.5;
  int64_t target = x < axis.to ? static_cast<int64_t>(x) : axis.to;
  while (target < axis.to && tap_at(axis, target).low < position) ++target;
  return target;
}

struct TargetRange {
  int64_t begin, end;
};

// The targets that source[position] has a share in: they are consecutive.
CTXOPS_HD TargetRange targets_of(const ResizeAxis& axis, int64_t position) {
  return {first_target(axis, position - 1), first_target(axis, position + 1)};
}

}  // namespace
}  // namespace ctxops
