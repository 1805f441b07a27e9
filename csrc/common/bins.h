// SPDX-License-Identifier: Apache-2.0
// Adaptive bins: n of them cover an axis of `extent` positions, and neighbours may overlap.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace ctxops {
namespace {

// Bin i covers the positions bin_start(i) ... bin_end(i) - 1; never none of them.
CTXOPS_HD int64_t bin_start(int64_t i, int64_t n, int64_t extent) { return i * extent / n; }
CTXOPS_HD int64_t bin_end(int64_t i, int64_t n, int64_t extent) {
  return ((i + 1) * extent + n - 1) / n;
}

// The bins that contain `position`: first_bin ... last_bin, both included.
CTXOPS_HD int64_t first_bin(int64_t position, int64_t n, int64_t extent) {
  return position * n / extent;
}
CTXOPS_HD int64_t last_bin(int64_t position, int64_t n, int64_t extent) {
  return ((position + 1) * n + extent - 1) / extent - 1;
}

}  // namespace
}  // namespace ctxops
