// SPDX-License-Identifier: Apache-2.0
// Comes before a .cu file: its launches are noted, and nothing runs. A kernel that is only named is
// not compiled.
#pragma once

#include <cstddef>
#include <typeinfo>

#define CTXOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (::launches::note(typeid(::launches::Kernel<(kernel)>), (grid), (block), (shared_bytes)))

#include "cuda_on_cpu.h"

namespace launches {

// The name of this type tells that of the kernel.
template <auto kKernel>
struct Kernel {};

const char* note(const std::type_info& kernel, dim3 grid, dim3 block, size_t shared_bytes);

}  // namespace launches
