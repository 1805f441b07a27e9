// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "common/parallel.h"
#include "pyramid_pool/pyramid_pool.h"

namespace ctxops {
namespace CTXOPS_ISA {
namespace {

// Work is cut into tiles of this many channels, whatever the number of threads.
constexpr int64_t kChannelTile = 256;  // maps with unit stride along C
constexpr int64_t kPlaneTile = 16;     // maps with unit stride along W: one cache line of cells
constexpr int64_t kColumnTile = 512;   // columns that are summed before they are cut into cells

// So many values are added in the accumulator's precision; then their sum goes to a double. A cell
// may have millions of positions, and a float would stop counting ones at 2^24.
constexpr int64_t kRun = 32;

struct Forward : PyramidPoolForward {
  CellAxis rows, columns;
  Threads threads;
};

inline int64_t tiles(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }

template <typename T>
T* at(const TensorView& view, int64_t b, int64_t c, int64_t h, int64_t w) {
  return static_cast<T*>(view.data) + b * view.stride[0] + c * view.stride[1] + h * view.stride[2] +
         w * view.stride[3];
}

// Element (b, r, q, c) of a contiguous (B, R, Q, C).
template <typename T>
T* cell(const TensorView& view, int64_t b, int64_t r, int64_t q, int64_t c) {
  return static_cast<T*>(view.data) + ((b * view.size[1] + r) * view.size[2] + q) * view.size[3] +
         c;
}

// Element (b, i, j) of a contiguous (B, I, J).
template <typename T>
T* row(const TensorView& view, int64_t b, int64_t i, int64_t j) {
  return static_cast<T*>(view.data) + (b * view.size[1] + i) * view.size[2] + j;
}

// sum[k] += x[k], or the running maximum with its position. x[k] stands at position + k * kStep.
template <bool kMaximum, bool kIndex, int kStep, typename T, typename A>
void accumulate(A* __restrict sum, int32_t* __restrict sum_at, const T* __restrict x,
                int64_t position, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    const A value = load(x[k]);
    if constexpr (!kMaximum) {
      sum[k] += value;
    } else if constexpr (kIndex) {
      const int32_t here = static_cast<int32_t>(position) + static_cast<int32_t>(k) * kStep;
      const bool better = is_better(value, here, sum[k], sum_at[k]);
      sum[k] = better ? value : sum[k];
      sum_at[k] = better ? here : sum_at[k];
    } else {
      sum[k] = value > sum[k] || value != value ? value : sum[k];
    }
  }
}

// What a long reduction is kept in: a double for sums, the values' own type for maxima.
template <typename A, bool kMaximum>
struct TotalOf {
  using type = double;
};
template <typename A>
struct TotalOf<A, true> {
  using type = A;
};
template <typename A, bool kMaximum>
using Total = typename TotalOf<A, kMaximum>::type;

template <bool kMaximum, bool kIndex, typename A, typename X>
void merge(A* __restrict sum, int32_t* __restrict sum_at, const X* __restrict x,
           const int32_t* __restrict x_at, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    if constexpr (!kMaximum) {
      sum[k] += x[k];
    } else if constexpr (kIndex) {
      const bool better = is_better(x[k], x_at[k], sum[k], sum_at[k]);
      sum[k] = better ? x[k] : sum[k];
      sum_at[k] = better ? x_at[k] : sum_at[k];
    } else {
      sum[k] = x[k] > sum[k] || x[k] != x[k] ? x[k] : sum[k];
    }
  }
}

// The neutral element. A maximum starts behind every position, so that even -inf replaces it.
template <bool kMaximum, bool kIndex, typename A>
void reset(A* sum, int32_t* sum_at, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    sum[k] = kMaximum ? static_cast<A>(-__builtin_inff()) : A(0);
    if constexpr (kIndex) sum_at[k] = INT32_MAX;
  }
}

// Cells of a map with unit stride along C: one row of cells and one tile of channels per item.
template <typename T, bool kMaximum, bool kIndex>
void cells_channels_inner(const Forward& p) {
  using A = Accumulator<T>;
  const int64_t B = p.input.size[0], C = p.input.size[1], W = p.input.size[3];
  const int64_t channel_tiles = tiles(C, kChannelTile);
  parallel_for(B * p.rows.count * channel_tiles, element_count(p.input), p.threads, [&](int64_t i) {
    const int64_t c = i % channel_tiles * kChannelTile, r = i / channel_tiles % p.rows.count;
    const int64_t b = i / channel_tiles / p.rows.count, count = smaller(kChannelTile, C - c);
    Total<A, kMaximum> total[kChannelTile];
    A run[kChannelTile];
    int32_t total_at[kIndex ? kChannelTile : 1], run_at[kIndex ? kChannelTile : 1];
    for (int64_t q = 0; q < p.columns.count; ++q) {
      reset<kMaximum, kIndex>(total, total_at, count);
      const int64_t right = cell_start(p.columns, q + 1);
      for (int64_t h = cell_start(p.rows, r); h < cell_start(p.rows, r + 1); ++h) {
        for (int64_t left = cell_start(p.columns, q); left < right; left += kRun) {
          reset<kMaximum, kIndex>(run, run_at, count);
          for (int64_t w = left; w < smaller(left + kRun, right); ++w) {
            const T* x = at<T>(p.input, b, c, h, w);
            accumulate<kMaximum, kIndex, 0>(run, run_at, x, h * W + w, count);
          }
          merge<kMaximum, kIndex>(total, total_at, run, run_at, count);
        }
      }
      A* to = cell<A>(p.cells, b, r, q, c);
      for (int64_t k = 0; k < count; ++k) to[k] = static_cast<A>(total[k]);
      if constexpr (kIndex) {
        memcpy(cell<int32_t>(p.cell_argmax, b, r, q, c), total_at, count * sizeof(int32_t));
      }
    }
  });
}

// Cells of a map with unit stride along W: a few planes per item. Rows are summed column by column,
// then the columns of each cell.
template <typename T, bool kMaximum, bool kIndex>
void cells_width_inner(const Forward& p) {
  using A = Accumulator<T>;
  const int64_t B = p.input.size[0], C = p.input.size[1], W = p.input.size[3];
  const int64_t plane_tiles = tiles(C, kPlaneTile);
  parallel_for(B * plane_tiles, element_count(p.input), p.threads, [&](int64_t i) {
    const int64_t b = i / plane_tiles, begin = i % plane_tiles * kPlaneTile;
    Total<A, kMaximum> column[kColumnTile];
    A run[kColumnTile];
    int32_t column_at[kIndex ? kColumnTile : 1], run_at[kIndex ? kColumnTile : 1];
    for (int64_t c = begin; c < smaller(begin + kPlaneTile, C); ++c) {
      for (int64_t r = 0; r < p.rows.count; ++r) {
        const int64_t bottom = cell_start(p.rows, r + 1);
        for (int64_t q = 0; q < p.columns.count; ++q) {
          reset<kMaximum, kIndex>(cell<A>(p.cells, b, r, q, c),
                                  kIndex ? cell<int32_t>(p.cell_argmax, b, r, q, c) : nullptr, 1);
        }
        int64_t q = 0;
        for (int64_t left = 0; left < W; left += kColumnTile) {
          const int64_t count = smaller(kColumnTile, W - left);
          reset<kMaximum, kIndex>(column, column_at, count);
          for (int64_t top = cell_start(p.rows, r); top < bottom; top += kRun) {
            reset<kMaximum, kIndex>(run, run_at, count);
            for (int64_t h = top; h < smaller(top + kRun, bottom); ++h) {
              const T* x = at<T>(p.input, b, c, h, left);
              accumulate<kMaximum, kIndex, 1>(run, run_at, x, h * W + left, count);
            }
            merge<kMaximum, kIndex>(column, column_at, run, run_at, count);
          }
          for (int64_t k = 0; k < count;) {
            while (cell_start(p.columns, q + 1) <= left + k) ++q;
            const int64_t end = smaller(count, cell_start(p.columns, q + 1) - left);
            Total<A, kMaximum> total;  // in a register, not in the cell's memory
            int32_t total_at;
            reset<kMaximum, kIndex>(&total, &total_at, 1);
            for (; k < end; ++k) {
              merge<kMaximum, kIndex>(&total, &total_at, column + k,
                                      kIndex ? column_at + k : nullptr, 1);
            }
            merge<kMaximum, kIndex>(cell<A>(p.cells, b, r, q, c),
                                    kIndex ? cell<int32_t>(p.cell_argmax, b, r, q, c) : nullptr,
                                    &total, &total_at, 1);
          }
        }
      }
    }
  });
}

template <typename T, bool kMaximum, bool kIndex>
void bins_from_cells(const Forward& p) {
  using A = Accumulator<T>;
  constexpr int64_t kTile = 64;
  const int64_t B = p.input.size[0], C = p.input.size[1], S = p.output.size[2];
  const int64_t H = p.input.size[2], W = p.input.size[3];
  const int64_t channel_tiles = tiles(C, kTile);
  const int64_t elements = element_count(p.cells) * p.sizes.count;
  parallel_for(B * channel_tiles, elements, p.threads, [&](int64_t item) {
    const int64_t b = item / channel_tiles, c = item % channel_tiles * kTile;
    const int64_t count = smaller(kTile, C - c);
    Total<A, kMaximum> sum[kTile];
    int32_t sum_at[kIndex ? kTile : 1];
    for (int64_t s = 0; s < S; ++s) {
      const Bin bin = bin_at(p.sizes, s);
      const int64_t top = bin_start(bin.i, bin.n, H), bottom = bin_end(bin.i, bin.n, H);
      const int64_t left = bin_start(bin.j, bin.n, W), right = bin_end(bin.j, bin.n, W);
      const int64_t last_r = cell_at(p.rows, bottom), last_q = cell_at(p.columns, right);
      reset<kMaximum, kIndex>(sum, sum_at, count);
      for (int64_t r = cell_at(p.rows, top); r < last_r; ++r) {
        for (int64_t q = cell_at(p.columns, left); q < last_q; ++q) {
          merge<kMaximum, kIndex>(sum, sum_at, cell<A>(p.cells, b, r, q, c),
                                  kIndex ? cell<int32_t>(p.cell_argmax, b, r, q, c) : nullptr,
                                  count);
        }
      }
      const double area = static_cast<double>((bottom - top) * (right - left));
      for (int64_t k = 0; k < count; ++k) {
        const auto value = kMaximum ? sum[k] : sum[k] / area;
        store(row<T>(p.output, b, c + k, s), static_cast<A>(value));
        if constexpr (kIndex) *row<int32_t>(p.argmax, b, s, c + k) = sum_at[k];
      }
    }
  });
}

template <typename T, bool kMaximum, bool kIndex>
void forward(const Forward& p) {
  if (unit_stride(p.input, 1)) {
    cells_channels_inner<T, kMaximum, kIndex>(p);
  } else {
    cells_width_inner<T, kMaximum, kIndex>(p);
  }
  bins_from_cells<T, kMaximum, kIndex>(p);
}

struct Backward : PyramidPoolBackward {
  CellAxis rows, columns;
  Threads threads;
};

// d(map)[h, w] = sum over the bins that hold (h, w) of d(bin) / area: constant within a cell.
template <typename T>
void gather_cells(const Backward& p) {
  using A = Accumulator<T>;
  const int64_t B = p.grad_input.size[0], C = p.grad_input.size[1];
  const int64_t H = p.grad_input.size[2], W = p.grad_input.size[3];
  const int64_t elements = element_count(p.grad_cells) * p.sizes.count;
  parallel_for(B * p.rows.count * p.columns.count, elements, p.threads, [&](int64_t item) {
    const int64_t q = item % p.columns.count, r = item / p.columns.count % p.rows.count;
    const int64_t b = item / p.columns.count / p.rows.count;
    double sum[kChannelTile];  // a cell of a tiny map may get thousands of bins
    for (int64_t first = 0; first < C; first += kChannelTile) {
      const int64_t count = smaller(kChannelTile, C - first);
      reset<false, false>(sum, nullptr, count);
      for_bins_at(p.sizes, H, W, cell_start(p.rows, r), cell_start(p.columns, q),
                  [&](int64_t s, int64_t area) {
                    const T* __restrict grad = row<T>(p.grad_output, b, s, first);
                    const double share = 1.0 / static_cast<double>(area);
                    for (int64_t k = 0; k < count; ++k) sum[k] += load(grad[k]) * share;
                  });
      A* to = cell<A>(p.grad_cells, b, r, q, first);
      for (int64_t k = 0; k < count; ++k) to[k] = static_cast<A>(sum[k]);
    }
  });
}

template <typename T>
void spread_cells_channels_inner(const Backward& p) {
  using A = Accumulator<T>;
  const int64_t B = p.grad_input.size[0], C = p.grad_input.size[1], H = p.grad_input.size[2];
  parallel_for(B * H, element_count(p.grad_input), p.threads, [&](int64_t item) {
    const int64_t b = item / H, h = item % H, r = cell_at(p.rows, h);
    for (int64_t q = 0; q < p.columns.count; ++q) {
      const A* __restrict from = cell<A>(p.grad_cells, b, r, q, 0);
      for (int64_t w = cell_start(p.columns, q); w < cell_start(p.columns, q + 1); ++w) {
        T* __restrict to = at<T>(p.grad_input, b, 0, h, w);
        for (int64_t c = 0; c < C; ++c) store(to + c, from[c]);
      }
    }
  });
}

template <typename T>
void spread_cells_width_inner(const Backward& p) {
  using A = Accumulator<T>;
  const int64_t B = p.grad_input.size[0], C = p.grad_input.size[1];
  const int64_t W = p.grad_input.size[3];
  const int64_t plane_tiles = tiles(C, kPlaneTile);
  parallel_for(B * plane_tiles, element_count(p.grad_input), p.threads, [&](int64_t item) {
    const int64_t b = item / plane_tiles, begin = item % plane_tiles * kPlaneTile;
    for (int64_t c = begin; c < smaller(begin + kPlaneTile, C); ++c) {
      for (int64_t r = 0; r < p.rows.count; ++r) {
        const int64_t top = cell_start(p.rows, r), bottom = cell_start(p.rows, r + 1);
        T* first = at<T>(p.grad_input, b, c, top, 0);
        for (int64_t q = 0; q < p.columns.count; ++q) {
          const A value = *cell<A>(p.grad_cells, b, r, q, c);
          for (int64_t w = cell_start(p.columns, q); w < cell_start(p.columns, q + 1); ++w) {
            store(first + w, value);
          }
        }
        for (int64_t h = top + 1; h < bottom; ++h) {
          memcpy(at<T>(p.grad_input, b, c, h, 0), first, W * sizeof(T));
        }
      }
    }
  });
}

// A maximum sends its gradient to one position. Every cell collects what was sent to its own
// positions: no two items write the same place, and the order of a sum is the order of the bins.
// The sum is kept in the map: the caller hands a float map where the gradient is in half precision.
template <typename T>
void gather_maxima(const Backward& p) {
  using A = Accumulator<T>;
  const int64_t B = p.grad_input.size[0], C = p.grad_input.size[1];
  const int64_t H = p.grad_input.size[2], W = p.grad_input.size[3];
  parallel_for(B * p.rows.count, element_count(p.grad_input), p.threads, [&](int64_t item) {
    const int64_t b = item / p.rows.count, r = item % p.rows.count;
    const int64_t top = cell_start(p.rows, r), bottom = cell_start(p.rows, r + 1);
    const bool channels_inner = unit_stride(p.grad_input, 1);
    for (int64_t i = 0; i < (channels_inner ? W : C); ++i) {
      for (int64_t h = top; h < bottom; ++h) {
        T* to = channels_inner ? at<T>(p.grad_input, b, 0, h, i) : at<T>(p.grad_input, b, i, h, 0);
        for (int64_t k = 0; k < (channels_inner ? C : W); ++k) store(to + k, A(0));
      }
    }
    for (int64_t q = 0; q < p.columns.count; ++q) {
      const int64_t left = cell_start(p.columns, q), right = cell_start(p.columns, q + 1);
      for_bins_at(p.sizes, H, W, top, left, [&](int64_t s, int64_t) {
        const int32_t* sent_to = row<int32_t>(p.argmax, b, s, 0);
        const T* grad = row<T>(p.grad_output, b, s, 0);
        for (int64_t c = 0; c < C; ++c) {
          const int64_t h = sent_to[c] / W, w = sent_to[c] % W;
          if (h < top || h >= bottom || w < left || w >= right) continue;
          T* to = at<T>(p.grad_input, b, c, h, w);
          store(to, load(*to) + load(grad[c]));
        }
      });
    }
  });
}

}  // namespace

const char* pyramid_pool_forward(const PyramidPoolForward& params, Threads threads) {
  return dispatch(params, [&](auto tag) -> const char* {
    using T = typename decltype(tag)::type;
    const Forward p{params, make_cell_axis(params.input.size[2], params.sizes),
                    make_cell_axis(params.input.size[3], params.sizes), threads};
    if (!p.maximum) {
      forward<T, false, false>(p);
    } else if (element_count(p.argmax) == 0) {
      forward<T, true, false>(p);
    } else {
      forward<T, true, true>(p);
    }
    return nullptr;
  });
}

const char* pyramid_pool_backward(const PyramidPoolBackward& params, Threads threads) {
  return dispatch(params, [&](auto tag) -> const char* {
    using T = typename decltype(tag)::type;
    const Backward p{params, make_cell_axis(params.grad_input.size[2], params.sizes),
                     make_cell_axis(params.grad_input.size[3], params.sizes), threads};
    if (element_count(p.argmax) > 0) {
      if constexpr (std::is_same_v<T, Accumulator<T>>) {
        gather_maxima<T>(p);
        return nullptr;
      }
      return "maxima of half precision need a float map";
    }
    gather_cells<T>(p);
    if (unit_stride(p.grad_input, 1)) {
      spread_cells_channels_inner<T>(p);
    } else {
      spread_cells_width_inner<T>(p);
    }
    return nullptr;
  });
}

}  // namespace CTXOPS_ISA
}  // namespace ctxops
