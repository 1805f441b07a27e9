// SPDX-License-Identifier: Apache-2.0
// Memory that CUDA kernels move several elements at a time, and the walk of many threads over a
// rectangle.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/cuda.h"
#include "common/tensor.h"

namespace ctxops {
namespace cuda {
namespace {

// V elements that one instruction loads or stores.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T x[V];

  // Element e for arithmetic. Of a word with two BFloat16 each takes one instruction; alone, the
  // upper one takes two.
  __device__ Accumulator<T> value(int e) const {
    if constexpr (std::is_same_v<T, BFloat16> && V % 2 == 0) {
      uint32_t word;
      memcpy(&word, x + e / 2 * 2, sizeof word);
      return bits_float(e % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      return load(x[e]);
    }
  }
};

template <typename T>
constexpr int kElements = 16 / static_cast<int>(sizeof(T));

template <int V, typename T>
__device__ Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <int V, typename T>
__device__ void store_pack(T* to, const Pack<T, V>& pack) {
  if constexpr (sizeof pack == 16) {  // a struct of scalars is not always stored at once
    uint4 words;
    memcpy(&words, &pack, sizeof words);
    __stwb(reinterpret_cast<uint4*>(to), words);
  } else if constexpr (sizeof pack == 8) {
    uint2 words;
    memcpy(&words, &pack, sizeof words);
    __stwb(reinterpret_cast<uint2*>(to), words);
  } else {
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
  }
}

inline bool aligned(const TensorView& view, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(view.data) % bytes == 0;
}

// Can all elements be loaded and stored in packs of V along `inner`, a dimension of unit stride?
template <typename T, int V>
bool packs_fit(const TensorView& view, int inner) {
  for (int i = 0; i < view.ndim; ++i) {
    if ((i == inner ? view.size[i] : view.stride[i]) % V != 0) return false;
  }
  return aligned(view, sizeof(T) * V);
}

// f(width of a pack): packs of 16 bytes of T, or single elements. A warp's doubles fill its loads.
template <typename T, typename F>
const char* with_packs(bool fit, const F& f) {
  if constexpr (sizeof(T) < 8) {
    if (fit) return f(std::integral_constant<int, kElements<T>>{});
  }
  return f(std::integral_constant<int, 1>{});
}

// The positions of a rectangle that one team of several gets: every teams-th, row by row.
class Walk {
 public:
  __device__ Walk(int team, int teams, int columns)
      : row_(team / columns),
        column_(team % columns),
        row_step_(teams / columns),
        column_step_(teams % columns),
        columns_(columns) {}

  __device__ void next() {
    row_ += row_step_;
    column_ += column_step_;
    if (column_ >= columns_) {
      column_ -= columns_;
      ++row_;
    }
  }
  __device__ int row() const { return row_; }
  __device__ int column() const { return column_; }

 private:
  int row_, column_, row_step_, column_step_, columns_;
};

}  // namespace
}  // namespace cuda
}  // namespace ctxops
