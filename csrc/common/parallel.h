// SPDX-License-Identifier: Apache-2.0
// A loop over independent items on OpenMP threads.
#pragma once

#include <cstdint>

#include "common/kernel.h"

namespace ctxops {
namespace {

// Below this many elements a team of threads costs more than it saves.
constexpr int64_t kSerialElements = 16384;

// f(i) for every i below `items`. Items are chosen by the problem, never by the number of threads,
// so results do not depend on it. `elements` is the work of all items together. f must not throw.
template <typename F>
void parallel_for(int64_t items, int64_t elements, Threads threads, const F& f) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>( \
        threads.count)) if (threads.count > 1 && items > 1 && elements > kSerialElements)
  for (int64_t i = 0; i < items; ++i) f(i);
}

}  // namespace
}  // namespace ctxops
