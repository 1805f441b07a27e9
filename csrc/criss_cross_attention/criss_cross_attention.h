// SPDX-License-Identifier: Apache-2.0
// criss_cross_attention: what torch's products cannot take as it lies, the columns of a contiguous
// map, turned into rows and back. On CUDA Triton serves.
#pragma once

#include "common/dtype.h"
#include "common/kernel.h"
#include "common/tensor.h"

CTXOPS_DECLARE_KERNEL(criss_cross_attention_turn, CrissCrossAttentionTurn)

namespace ctxops {

struct CrissCrossAttentionTurn {
  TensorView input;   // (C, M, N), unit stride along N
  TensorView output;  // (C, N, M), unit stride along M, same dtype

  CTXOPS_MEMBERS(input, output);
  CTXOPS_INLINE const TensorView& like() const { return input; }
  CTXOPS_INLINE bool empty() const { return element_count(output) == 0; }
  const char* check() const;
};

CTXOPS_INLINE const char* CrissCrossAttentionTurn::check() const {
  if (input.ndim != 3 || !unit_stride(input, 2)) {
    return "input must be (C, M, N) with unit stride along N";
  }
  if (output.ndim != 3 || output.dtype != input.dtype || output.size[0] != input.size[0] ||
      output.size[1] != input.size[2] || output.size[2] != input.size[1] ||
      !unit_stride(output, 2)) {
    return "output must be (C, N, M) with unit stride along M, in the input's dtype";
  }
  return nullptr;
}

}  // namespace ctxops
