// SPDX-License-Identifier: Apache-2.0
// One axis of a dilated window, on the host and on the device.
//
// The positions p, p + dilation, p + 2 * dilation, ... form a residue class; within it, windows are
// dense. A window starts at a step of its class and holds `kernel` steps.
#pragma once

#include "common/tensor.h"

namespace ctxops {

// What stands where a window leaves the map, and what Python calls it.
enum class Border { zeros, mask, shift };
constexpr const char* kBorderNames[] = {"zeros", "mask", "shift"};

namespace {

struct WindowAxis {
  int64_t extent;    // positions
  int64_t kernel;    // steps of a window
  int64_t dilation;  // positions between two steps
  Border border;
};

// The steps of the class that holds `position`.
CTXOPS_HD int64_t class_steps(const WindowAxis& axis, int64_t position) {
  return (axis.extent - 1 - position % axis.dilation) / axis.dilation + 1;
}

CTXOPS_HD int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// The first step of the window of step `query`; outside the class, below 0, where the border
// allows.
CTXOPS_HD int64_t window_start(const WindowAxis& axis, int64_t query, int64_t steps) {
  const int64_t centred = query - axis.kernel / 2;
  return axis.border == Border::shift ? clamp(centred, 0, steps - axis.kernel) : centred;
}

struct StepRange {
  int64_t begin, end;
};

// The part of a window that lies in the class.
CTXOPS_HD StepRange window_inside(const WindowAxis& axis, int64_t start, int64_t steps) {
  const int64_t end = start + axis.kernel;
  return {start < 0 ? 0 : start, end < steps ? end : steps};
}

// Where in the window of a position the neighbour so many steps from it lies; -1: the window does
// not hold it, or it is outside the class.
CTXOPS_HD int64_t neighbour_at(const WindowAxis& axis, int64_t position, int64_t steps_to) {
  const int64_t query = position / axis.dilation, steps = class_steps(axis, position);
  const int64_t start = window_start(axis, query, steps), neighbour = query + steps_to;
  const StepRange inside = window_inside(axis, start, steps);
  return neighbour >= inside.begin && neighbour < inside.end ? neighbour - start : -1;
}

// The steps whose windows hold step `key`: they are consecutive.
CTXOPS_HD StepRange queries_of(const WindowAxis& axis, int64_t key, int64_t steps) {
  const int64_t before = axis.kernel / 2, after = axis.kernel - 1 - before;
  StepRange range{clamp(key - after, 0, steps), clamp(key + before + 1, 0, steps)};
  if (axis.border == Border::shift) {
    // The first window serves all queries up to `before`, the last one all from steps - after - 1.
    if (key < axis.kernel) range.begin = 0;
    if (key >= steps - axis.kernel) range.end = steps;
  }
  return range;
}

}  // namespace
}  // namespace ctxops
