// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "common/cuda.h"
#include "common/pack.h"
#include "pyramid_pool/pyramid_pool.h"

namespace ctxops {
namespace cuda {
namespace {

constexpr int kThreads = 256;
// Of blocks whose threads have nothing to share: few, so that few items lie on many
// multiprocessors.
constexpr int kThreadsAlone = 64;

// Below this many threads the rows of a cell, or the cells of a bin, are divided among teams. A
// property of the problem and not of the device, so that sums are the same on every device.
constexpr int64_t kBusyThreads = 1 << 18;

enum class Mode { mean, maximum };

// On a multiprocessor at least: 80 registers for a thread. Where a maximum has its place beside it,
// or elements are loaded one by one, that is too few.
constexpr int blocks_of(Mode mode, int V) { return mode == Mode::maximum || V == 1 ? 2 : 3; }

// A thread adds at most so many floats one to the other; the sums of such runs are added in double.
constexpr int kRun = 16;

template <typename A, Mode kMode>
constexpr bool kInRuns = kMode == Mode::mean && sizeof(A) < sizeof(double);

// A block works on `items` pieces at a time. The positions of a piece are dealt to `teams`; a team
// is `lanes` threads side by side in memory. Powers of two whose product is kThreads.
struct BlockLayout {
  int lanes, teams, items;
};

struct Place {
  int lane, team, item;
};

__device__ Place place_in(const BlockLayout& layout) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane_bits = __ffs(layout.lanes) - 1, team_bits = __ffs(layout.teams) - 1;
  return {thread & (layout.lanes - 1), (thread >> lane_bits) & (layout.teams - 1),
          thread >> (lane_bits + team_bits)};
}

// argmax and cell_argmax without memory: not wanted.
struct Forward : PyramidPoolForward {
  CellAxis rows, columns;
};

// grad_cells without memory: the gradient is zero.
struct Backward : PyramidPoolBackward {
  CellAxis rows, columns;
};

template <typename T>
__device__ T* at(const TensorView& view, int64_t b, int64_t c, int64_t h, int64_t w) {
  return static_cast<T*>(view.data) + b * view.stride[0] + c * view.stride[1] + h * view.stride[2] +
         w * view.stride[3];
}

// Element (b, r, q, c) of a contiguous (B, R, Q, C).
template <typename T>
__device__ T* cell(const TensorView& view, int64_t b, int64_t r, int64_t q, int64_t c) {
  return static_cast<T*>(view.data) + ((b * view.size[1] + r) * view.size[2] + q) * view.size[3] +
         c;
}

// Element (b, i, j) of a contiguous (B, I, J).
template <typename T>
__device__ T* row(const TensorView& view, int64_t b, int64_t i, int64_t j) {
  return static_cast<T*>(view.data) + (b * view.size[1] + i) * view.size[2] + j;
}

// The positions from element `offset` on, where they are wanted.
__device__ int32_t* positions(const TensorView& view, int64_t offset) {
  return view.data ? static_cast<int32_t*>(view.data) + offset : nullptr;
}

// Element `offset` of a contiguous tensor. The few that are written so need no kernel of their own.
template <typename A>
__device__ void store_as(const TensorView& view, int64_t offset, A x) {
  switch (view.dtype) {
    case DType::float16: return store(static_cast<Half*>(view.data) + offset, x);
    case DType::bfloat16: return store(static_cast<BFloat16*>(view.data) + offset, x);
    default: return store(static_cast<A*>(view.data) + offset, x);
  }
}

// A running sum, or a running maximum with its position. A maximum starts behind every position, so
// that even -inf replaces it.
template <typename A, Mode kMode>
struct Running {
  A value = kMode == Mode::mean ? A(0) : -static_cast<A>(INFINITY);
  int32_t at = INT32_MAX;

  __device__ void include(A x, int32_t x_at) {
    if constexpr (kMode == Mode::mean) {
      value += x;
    } else {
      const bool better = is_better(x, x_at, value, at);
      value = better ? x : value;
      at = better ? x_at : at;
    }
  }
};

// Partial results in the memory that a block shares: `count` values, then as many positions.
template <typename A, Mode kMode>
struct Partials {
  using Value = std::conditional_t<kMode == Mode::mean, double, A>;
  using Total = Running<Value, kMode>;
  Value* value;
  int32_t* at;

  __device__ Partials(Value* memory, int count)
      : value(memory), at(reinterpret_cast<int32_t*>(memory + count)) {}

  // What a thread found in its first run or, of means, in a following one.
  __device__ void put(int slot, const Running<A, kMode>& found, bool first_run) const {
    value[slot] = first_run ? found.value : value[slot] + found.value;
    if constexpr (kMode == Mode::maximum) at[slot] = found.at;
  }
  __device__ void put(int slot, const Total& total) const {
    value[slot] = total.value;
    if constexpr (kMode == Mode::maximum) at[slot] = total.at;
  }
  __device__ void add_to(Total* total, int slot) const {
    total->include(value[slot], kMode == Mode::maximum ? at[slot] : 0);
  }
  static size_t bytes(int count) {
    return count * (sizeof(Value) + (kMode == Mode::maximum ? sizeof(int32_t) : 0));
  }
};

// Where column `i` of a team's strip lies in its slots: neighbouring threads use neighbouring slots
// when they put what they have loaded in packs.
template <int V>
__device__ int slot_of(int i, int lanes) {
  return i % V * lanes + i / V;
}

// The slots of one item, padded so that threads which read the same column of different items meet
// in different banks.
CTXOPS_HD int item_slots(const BlockLayout& layout, int elements) {
  return layout.teams * layout.lanes * elements + 1;
}

// Cells of a map with unit stride along W. An item is a plane, a piece of work one row of cells of
// neighbouring planes: every thread reduces the rows of its columns, strip by strip, then the block
// reduces the columns of each cell.
template <typename T, Mode kMode, int V>
__global__ void __launch_bounds__(kThreads, blocks_of(kMode, V))
    cells_width_inner_kernel(const __grid_constant__ Forward p, const BlockLayout layout) {
  using A = Accumulator<T>;
  constexpr int kPacks = kElements<T> / V;
  constexpr int kUnroll = V == 1 ? (kPacks < 8 ? 8 / kPacks : 1) : 4;
  using Shared = Partials<A, kMode>;
  CTXOPS_DYNAMIC_SHARED(typename Shared::Value, shared);
  const int slots = item_slots(layout, kElements<T>);
  const Shared partials(shared, layout.items * slots);
  const Place me = place_in(layout);
  const int strip = layout.lanes * kElements<T>;
  const int my_slots = me.item * slots + me.team * strip + me.lane;
  // Neighbouring threads write the cells of neighbouring planes.
  const int to_item = threadIdx.x % layout.items, to_piece = threadIdx.x / layout.items;
  const int pieces = kThreads / layout.items;

  const int64_t C = p.input.size[1], R = p.rows.count, Q = p.columns.count;
  const unsigned W = static_cast<unsigned>(p.input.size[3]);
  const int64_t planes = p.input.size[0] * C, row_stride = p.input.stride[2];
  const int64_t works = (planes + layout.items - 1) / layout.items * R;

  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t r = work % R, plane = work / R * layout.items + me.item;
    const int64_t top = cell_start(p.rows, r);
    const unsigned rows =
        plane < planes ? static_cast<unsigned>(cell_start(p.rows, r + 1) - top) : 0;
    const T* const map = at<T>(p.input, plane / C, plane % C, top, 0);  // (rows, W)

    const int64_t to_plane = work / R * layout.items + to_item;
    const int64_t to = ((to_plane / C * R + r) * Q) * C + to_plane % C;
    A* const cells = static_cast<A*>(p.cells.data) + to;        // (Q,), C apart
    int32_t* const cell_argmax = positions(p.cell_argmax, to);  // (Q,), C apart

    typename Shared::Total total;
    for (unsigned left = 0; left < W; left += strip) {
      const T* const here = map + left + me.lane * V;
      const int32_t position = static_cast<int32_t>(top * W + left) + me.lane * V;
      bool inside[kPacks];
#pragma unroll
      for (int n = 0; n < kPacks; ++n) inside[n] = left + (n * layout.lanes + me.lane) * V < W;

      unsigned i = me.team;
      do {
        Running<A, kMode> column[kElements<T>];
        const bool first_run = i == static_cast<unsigned>(me.team);
        const unsigned run_end = i + kRun * layout.teams;
        const unsigned stop = kInRuns<A, kMode> && run_end < rows ? run_end : rows;
        for (; i < stop; i += kUnroll * layout.teams) {
          Pack<T, V> x[kUnroll][kPacks];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const unsigned h = i + u * layout.teams;
#pragma unroll
            for (int n = 0; n < kPacks; ++n) {
              if (h < rows && inside[n]) {
                x[u][n] = load_pack<V>(here + h * row_stride + n * layout.lanes * V);
              }
            }
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const unsigned h = i + u * layout.teams;
#pragma unroll
            for (int n = 0; n < kPacks; ++n) {
              if (h < rows && inside[n]) {
                const int32_t first = position + static_cast<int32_t>(h * W) + n * layout.lanes * V;
#pragma unroll
                for (int k = 0; k < V; ++k) {
                  column[n * V + k].include(x[u][n].value(k), first + k);
                }
              }
            }
          }
        }
#pragma unroll
        for (int k = 0; k < kElements<T>; ++k) {
          partials.put(my_slots + k * layout.lanes, column[k], first_run);
        }
      } while (kInRuns<A, kMode> && i < rows);
      __syncthreads();

      // Of every column, what the teams found: most threads have none of the few cells below.
      if (layout.teams > 1) {
        for (int i = threadIdx.x; i < layout.items * strip; i += kThreads) {
          const int slot = i / strip * slots + i % strip;
          typename Shared::Total column;
          for (int team = 0; team < layout.teams; ++team) {
            partials.add_to(&column, slot + team * strip);
          }
          partials.put(slot, column);
        }
        __syncthreads();
      }

      const unsigned right = left + strip < W ? left + strip : W;
      const int64_t first_q = cell_at(p.columns, left);
      const int64_t end_q = cell_at(p.columns, right - 1) + 1;
      // A cell has one thread, which keeps the total of the cell from strip to strip.
      for (int64_t q = first_q + ((to_piece - first_q) & (pieces - 1));
           to_plane < planes && q < end_q; q += pieces) {
        const int64_t start = cell_start(p.columns, q), stop = cell_start(p.columns, q + 1);
        const int begin = static_cast<int>((start > left ? start : left) - left);
        const int end = static_cast<int>((stop < right ? stop : right) - left);
        if (start >= left) total = {};
        for (int k = begin; k < end; ++k) {
          partials.add_to(&total, to_item * slots + slot_of<V>(k, layout.lanes));
        }
        if (stop > right) continue;
        cells[q * C] = static_cast<A>(total.value);
        if (cell_argmax) cell_argmax[q * C] = total.at;
      }
      __syncthreads();
    }
  }
}

// A rectangle of the map, from its top left position on, and V channels of it.
template <typename T, int V>
struct MapSource {
  struct Sample {
    Pack<T, V> value;
    int32_t position;
    __device__ int32_t at(int) const { return position; }
  };
  const T* data;
  int64_t row_stride, column_stride;
  int64_t position, W;

  __device__ Sample sample(int64_t i, int64_t j) const {
    return {load_pack<V>(data + i * row_stride + j * column_stride),
            static_cast<int32_t>(position + i * W + j)};
  }
};

// A rectangle of cells, likewise; the cells of maxima may bring their positions along.
template <typename A, Mode kMode, int V>
struct CellSource {
  struct Sample {
    Pack<A, V> value;
    Pack<int32_t, V> position;
    __device__ int32_t at(int k) const { return position.x[k]; }
  };
  const A* data;
  const int32_t* positions;
  int64_t row_stride, column_stride;

  __device__ Sample sample(int64_t i, int64_t j) const {
    const int64_t offset = i * row_stride + j * column_stride;
    Sample sample = {load_pack<V>(data + offset), {}};
    if (kMode == Mode::maximum && positions) sample.position = load_pack<V>(positions + offset);
    return sample;
  }
};

// Reduces for every item a rectangle of `rows`, perhaps none, times `columns` positions, then calls
// write(channel, total), the channel counted within the tile of the thread's own item. Every thread
// of the block calls it.
template <int V, typename A, Mode kMode, typename Source, typename Write>
__device__ void reduce_rectangles(const Partials<A, kMode>& partials, const BlockLayout& layout,
                                  const Place& me, const Source& source, int64_t rows,
                                  int64_t columns, const Write& write) {
  constexpr int kUnroll = V == 1 ? 8 : 4;
  const int tile = layout.lanes * V, first_slot = me.item * item_slots(layout, V);
  const int teams = layout.teams;
  Walk walk(me.team, teams, static_cast<int>(columns));
  const int64_t count = rows * columns;
  int64_t i = me.team;
  do {
    Running<A, kMode> found[V];
    const bool first_run = i == me.team;
    const int64_t run_end = i + kRun * teams;
    const int64_t stop = kInRuns<A, kMode> && run_end < count ? run_end : count;
    for (; i < stop; i += kUnroll * teams) {
      typename Source::Sample x[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * teams < count) {
          x[u] = source.sample(walk.row(), walk.column());
          walk.next();
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * teams < count) {
#pragma unroll
          for (int k = 0; k < V; ++k) found[k].include(x[u].value.value(k), x[u].at(k));
        }
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      partials.put(first_slot + me.team * tile + k * layout.lanes + me.lane, found[k], first_run);
    }
  } while (kInRuns<A, kMode> && i < count);
  __syncthreads();
  for (int channel = me.team * layout.lanes + me.lane; channel < tile;
       channel += teams * layout.lanes) {
    typename Partials<A, kMode>::Total total;
    for (int team = 0; team < teams; ++team) {
      partials.add_to(&total, first_slot + team * tile + slot_of<V>(channel, layout.lanes));
    }
    write(channel, total);
  }
  __syncthreads();
}

// One cell, or one bin, and a tile of its channels.
struct CellTile {
  int64_t b, r, q, c;
};

__device__ CellTile cell_tile(int64_t index, int64_t R, int64_t Q, int64_t tiles, int tile) {
  return {index / tiles / Q / R, index / tiles / Q % R, index / tiles % Q, index % tiles * tile};
}

// Cells of a map with unit stride along C. An item is a cell and a tile of channels.
template <typename T, Mode kMode, int V>
__global__ void __launch_bounds__(kThreads, blocks_of(kMode, V))
    cells_channels_inner_kernel(const __grid_constant__ Forward p, const BlockLayout layout) {
  using A = Accumulator<T>;
  using Shared = Partials<A, kMode>;
  CTXOPS_DYNAMIC_SHARED(typename Shared::Value, shared);
  const Shared partials(shared, layout.items * item_slots(layout, V));
  const Place me = place_in(layout);

  const int64_t C = p.input.size[1], W = p.input.size[3];
  const int64_t R = p.rows.count, Q = p.columns.count;
  const int tile = layout.lanes * V;
  const int64_t tiles = (C + tile - 1) / tile, items = p.input.size[0] * R * Q * tiles;

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * layout.items; first < items;
       first += static_cast<int64_t>(gridDim.x) * layout.items) {
    const bool valid = first + me.item < items;
    const CellTile my = cell_tile(first + me.item, R, Q, tiles, tile);
    const int64_t c = my.c + me.lane * V;
    const int64_t top = cell_start(p.rows, my.r), left = cell_start(p.columns, my.q);
    const MapSource<T, V> source{at<T>(p.input, my.b, c, top, left), p.input.stride[2],
                                 p.input.stride[3], top * W + left, W};
    const int64_t rows = valid && c < C ? cell_start(p.rows, my.r + 1) - top : 0;
    const int64_t to = ((my.b * R + my.r) * Q + my.q) * C + my.c;
    A* const cells = static_cast<A*>(p.cells.data) + to;        // (tile,)
    int32_t* const cell_argmax = positions(p.cell_argmax, to);  // (tile,)
    reduce_rectangles<V>(partials, layout, me, source, rows, cell_start(p.columns, my.q + 1) - left,
                         [&](int channel, const auto& total) {
                           if (!valid || my.c + channel >= C) return;
                           cells[channel] = static_cast<A>(total.value);
                           if (cell_argmax) cell_argmax[channel] = total.at;
                         });
  }
}

// Bins from cells. An item is a bin and a tile of channels.
template <typename A, Mode kMode, int V>
__global__ void __launch_bounds__(kThreads, blocks_of(kMode, V))
    bins_kernel(const __grid_constant__ Forward p, const BlockLayout layout) {
  using Shared = Partials<A, kMode>;
  CTXOPS_DYNAMIC_SHARED(typename Shared::Value, shared);
  const Shared partials(shared, layout.items * item_slots(layout, V));
  const Place me = place_in(layout);

  const int64_t C = p.input.size[1], H = p.input.size[2], W = p.input.size[3];
  const int64_t S = p.output.size[2];
  const int tile = layout.lanes * V;
  const int64_t tiles = (C + tile - 1) / tile, items = p.input.size[0] * S * tiles;

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * layout.items; first < items;
       first += static_cast<int64_t>(gridDim.x) * layout.items) {
    const bool valid = first + me.item < items;
    const CellTile my = cell_tile(valid ? first + me.item : 0, 1, S, tiles, tile);
    const Bin bin = bin_at(p.sizes, my.q);
    const int64_t top = bin_start(bin.i, bin.n, H), bottom = bin_end(bin.i, bin.n, H);
    const int64_t left = bin_start(bin.j, bin.n, W), right = bin_end(bin.j, bin.n, W);
    const int64_t c = my.c + me.lane * V;
    const int64_t r = cell_at(p.rows, top), q = cell_at(p.columns, left);
    const int64_t from = ((my.b * p.rows.count + r) * p.columns.count + q) * C + c;
    const CellSource<A, kMode, V> source{static_cast<const A*>(p.cells.data) + from,
                                         positions(p.cell_argmax, from), p.columns.count * C, C};
    const int64_t rows = valid && c < C ? cell_at(p.rows, bottom) - r : 0;
    const int64_t columns = cell_at(p.columns, right) - q;
    const A area = static_cast<A>((bottom - top) * (right - left));
    reduce_rectangles<V>(
        partials, layout, me, source, rows, columns, [&](int channel, const auto& total) {
          const int64_t to = my.c + channel;
          if (!valid || to >= C) return;
          const A value = static_cast<A>(total.value);
          store_as(p.output, (my.b * C + to) * S + my.q,
                   kMode == Mode::mean ? value / area : value);
          if (int32_t* const argmax = positions(p.argmax, (my.b * S + my.q) * C + to)) {
            *argmax = total.at;
          }
        });
  }
}

// d(map)[h, w] = sum over the bins that hold (h, w) of d(bin) / area: constant within a cell. One
// thread for V channels of one cell.
template <typename T, int V>
__global__ void __launch_bounds__(kThreadsAlone, 10)
    gather_cells_kernel(const __grid_constant__ Backward p) {
  using A = Accumulator<T>;
  const int64_t C = p.grad_input.size[1], H = p.grad_input.size[2], W = p.grad_input.size[3];
  const int64_t R = p.rows.count, Q = p.columns.count, packs = C / V;
  const int64_t items = p.grad_input.size[0] * R * Q * packs;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreadsAlone + threadIdx.x; item < items;
       item += static_cast<int64_t>(gridDim.x) * kThreadsAlone) {
    const CellTile my = cell_tile(item, R, Q, packs, V);
    double sum[V] = {};  // a cell of a tiny map may get thousands of bins
    for_bins_at(p.sizes, H, W, cell_start(p.rows, my.r), cell_start(p.columns, my.q),
                [&](int64_t s, int64_t area) {
                  const double share = 1.0 / static_cast<double>(area);
                  const Pack<T, V> grad = load_pack<V>(row<T>(p.grad_output, my.b, s, my.c));
#pragma unroll
                  for (int k = 0; k < V; ++k) sum[k] += grad.value(k) * share;
                });
    Pack<A, V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) result.x[k] = static_cast<A>(sum[k]);
    store_pack(cell<A>(p.grad_cells, my.b, my.r, my.q, my.c), result);
  }
}

// Writes the gradient of every cell to its positions; the counterpart of cells_width_inner_kernel.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    spread_width_inner_kernel(const __grid_constant__ Backward p, const BlockLayout layout) {
  using A = Accumulator<T>;
  constexpr int kPacks = kElements<T> / V;
  CTXOPS_DYNAMIC_SHARED(T, shared);
  const Place me = place_in(layout);

  const int64_t C = p.grad_input.size[1], W = p.grad_input.size[3];
  const int64_t R = p.rows.count, Q = p.columns.count;
  const int64_t planes = p.grad_input.size[0] * C, row_stride = p.grad_input.stride[2];
  const int strip = layout.lanes * kElements<T>, slots = strip + 1;
  const int from_item = threadIdx.x % layout.items, from_piece = threadIdx.x / layout.items;
  const int64_t works = (planes + layout.items - 1) / layout.items * R;

  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t r = work % R, plane = work / R * layout.items + me.item;
    const int64_t top = cell_start(p.rows, r);
    const unsigned rows =
        plane < planes ? static_cast<unsigned>(cell_start(p.rows, r + 1) - top) : 0;
    T* const map = at<T>(p.grad_input, plane / C, plane % C, top, 0);  // (rows, W)

    const int64_t from_plane = work / R * layout.items + from_item;
    const A* const cells = static_cast<const A*>(p.grad_cells.data) +
                           ((from_plane / C * R + r) * Q) * C + from_plane % C;  // (Q,), C apart

    for (int64_t left = 0; left < W; left += strip) {
      const int64_t right = left + strip < W ? left + strip : W;
      const int64_t end_q = cell_at(p.columns, right - 1) + 1;
      for (int64_t q = cell_at(p.columns, left) + from_piece; from_plane < planes && q < end_q;
           q += kThreads / layout.items) {
        const int64_t start = cell_start(p.columns, q), stop = cell_start(p.columns, q + 1);
        const int begin = static_cast<int>((start > left ? start : left) - left);
        const int end = static_cast<int>((stop < right ? stop : right) - left);
        T value;
        store(&value, p.grad_cells.data ? cells[q * C] : A(0));
        for (int k = begin; k < end; ++k) {
          shared[from_item * slots + slot_of<V>(k, layout.lanes)] = value;
        }
      }
      __syncthreads();

      Pack<T, V> x[kPacks];
#pragma unroll
      for (int k = 0; k < kElements<T>; ++k) {
        x[k / V].x[k % V] = shared[me.item * slots + k * layout.lanes + me.lane];
      }
      bool inside[kPacks];
#pragma unroll
      for (int n = 0; n < kPacks; ++n) inside[n] = left + (n * layout.lanes + me.lane) * V < W;
      for (unsigned h = me.team; h < rows; h += layout.teams) {
        T* const to = map + h * row_stride + left + me.lane * V;
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
          if (inside[n]) store_pack(to + n * layout.lanes * V, x[n]);
        }
      }
      __syncthreads();
    }
  }
}

// The counterpart of cells_channels_inner_kernel.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    spread_channels_inner_kernel(const __grid_constant__ Backward p, const BlockLayout layout) {
  using A = Accumulator<T>;
  const Place me = place_in(layout);
  const int64_t C = p.grad_input.size[1], R = p.rows.count, Q = p.columns.count;
  const int tile = layout.lanes * V;
  const int64_t tiles = (C + tile - 1) / tile, items = p.grad_input.size[0] * R * Q * tiles;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * layout.items + me.item; item < items;
       item += static_cast<int64_t>(gridDim.x) * layout.items) {
    const CellTile my = cell_tile(item, R, Q, tiles, tile);
    const int64_t c = my.c + me.lane * V;
    if (c >= C) continue;
    Pack<A, V> sum = {};
    if (p.grad_cells.data) sum = load_pack<V>(cell<A>(p.grad_cells, my.b, my.r, my.q, c));
    Pack<T, V> x;
#pragma unroll
    for (int k = 0; k < V; ++k) store(&x.x[k], sum.x[k]);

    const int64_t top = cell_start(p.rows, my.r), left = cell_start(p.columns, my.q);
    const int64_t columns = cell_start(p.columns, my.q + 1) - left;
    const int64_t count = (cell_start(p.rows, my.r + 1) - top) * columns;
    Walk walk(me.team, layout.teams, static_cast<int>(columns));
    for (int64_t i = me.team; i < count; i += layout.teams) {
      store_pack(at<T>(p.grad_input, my.b, c, top + walk.row(), left + walk.column()), x);
      walk.next();
    }
  }
}

// A maximum sends its gradient to one position of a map of zeros. One thread for one channel of one
// bin; the first of the bins that chose a position writes the sum of all, in their order.
template <typename T>
__global__ void __launch_bounds__(kThreadsAlone, 10)
    send_maxima_kernel(const __grid_constant__ Backward p) {
  using A = Accumulator<T>;
  const int64_t C = p.grad_input.size[1], H = p.grad_input.size[2], W = p.grad_input.size[3];
  const int64_t S = p.grad_output.size[1], items = p.grad_input.size[0] * S * C;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreadsAlone + threadIdx.x; item < items;
       item += static_cast<int64_t>(gridDim.x) * kThreadsAlone) {
    const CellTile my = cell_tile(item, 1, S, C, 1);
    const int32_t position = *row<int32_t>(p.argmax, my.b, my.q, my.c);
    const int64_t h = position / W, w = position % W;
    bool first = true;
    A sum = 0;
    for_bins_at(p.sizes, H, W, h, w, [&](int64_t s, int64_t) {
      if (!first || *row<int32_t>(p.argmax, my.b, s, my.c) != position) return;
      first = s >= my.q;
      sum += load(*row<T>(p.grad_output, my.b, s, my.c));
    });
    if (first) store(at<T>(p.grad_input, my.b, my.c, h, w), sum);
  }
}

bool channels_inner(const TensorView& map) {
  return unit_stride(map, 1) && (map.size[1] > 1 || !unit_stride(map, 3));
}

// `extent` elements side by side, `per_lane` of them for a lane; and at most `teams` teams.
BlockLayout block_layout(int64_t extent, int per_lane, int64_t teams) {
  BlockLayout layout{1, 1, 1};
  while (layout.lanes < 32 && layout.lanes * per_lane < extent) layout.lanes *= 2;
  while (layout.teams * 2 <= smaller(teams, kThreads / layout.lanes)) layout.teams *= 2;
  layout.items = kThreads / layout.lanes / layout.teams;
  return layout;
}

// Planes are many and long: their rows are divided among teams only where threads are few.
template <typename T>
BlockLayout width_inner_layout(const TensorView& map, int64_t rows_of_cells) {
  const BlockLayout one_team = block_layout(map.size[3], kElements<T>, 1);
  const int64_t threads = map.size[0] * map.size[1] * rows_of_cells * one_team.lanes;
  const int64_t teams = smaller(map.size[2] / rows_of_cells, divide_up(kBusyThreads, threads));
  return block_layout(map.size[3], kElements<T>, teams);
}

// A team for every position of an average cell.
BlockLayout channels_inner_layout(const TensorView& map, int V, int64_t cells) {
  return block_layout(map.size[1], V, map.size[2] * map.size[3] / cells);
}

// A team for every cell of an average bin; for more cells where threads are few, as the largest bin
// then takes the longest.
BlockLayout bins_layout(const Forward& p, int V) {
  const int64_t C = p.input.size[1], S = p.output.size[2];
  const int64_t cells = p.rows.count * p.columns.count;
  const BlockLayout one_team = block_layout(C, V, 1);
  const int64_t tiles = divide_up(C, one_team.lanes * V);
  const int64_t threads = p.input.size[0] * S * tiles * one_team.lanes;
  const int64_t wanted = smaller(cells, divide_up(kBusyThreads, threads));
  const int64_t average = p.sizes.count * cells / S;
  return block_layout(C, V, average < wanted ? wanted : average);
}

template <typename T, Mode kMode>
const char* launch_cells(const Forward& p, cudaStream_t stream) {
  using A = Accumulator<T>;
  const int64_t B = p.input.size[0], C = p.input.size[1], R = p.rows.count, Q = p.columns.count;
  if (channels_inner(p.input)) {
    return with_packs<T>(packs_fit<T, kElements<T>>(p.input, 1), [&](auto width) {
      constexpr int V = decltype(width)::value;
      const BlockLayout layout = channels_inner_layout(p.input, V, R * Q);
      const int64_t items = B * R * Q * divide_up(C, layout.lanes * V);
      return CTXOPS_LAUNCH((cells_channels_inner_kernel<T, kMode, V>),
                           grid_size(divide_up(items, layout.items)), kThreads,
                           (Partials<A, kMode>::bytes(layout.items * item_slots(layout, V))),
                           stream, p, layout);
    });
  }
  return with_packs<T>(packs_fit<T, kElements<T>>(p.input, 3), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const BlockLayout layout = width_inner_layout<T>(p.input, R);
    const int slots = layout.items * item_slots(layout, kElements<T>);
    return CTXOPS_LAUNCH((cells_width_inner_kernel<T, kMode, V>),
                         grid_size(divide_up(B * C, layout.items) * R), kThreads,
                         (Partials<A, kMode>::bytes(slots)), stream, p, layout);
  });
}

template <typename A, Mode kMode>
const char* launch_bins(const Forward& p, cudaStream_t stream) {
  const int64_t C = p.input.size[1], S = p.output.size[2];
  const bool packs = packs_fit<A, kElements<A>>(p.cells, 3) && aligned(p.cell_argmax, 16);
  return with_packs<A>(packs, [&](auto width) {
    constexpr int V = decltype(width)::value;
    const BlockLayout layout = bins_layout(p, V);
    const int64_t items = p.input.size[0] * S * divide_up(C, layout.lanes * V);
    return CTXOPS_LAUNCH(
        (bins_kernel<A, kMode, V>), grid_size(divide_up(items, layout.items)), kThreads,
        (Partials<A, kMode>::bytes(layout.items * item_slots(layout, V))), stream, p, layout);
  });
}

template <typename T, Mode kMode>
const char* forward(const Forward& p, cudaStream_t stream) {
  if (const char* error = launch_cells<T, kMode>(p, stream)) return error;
  return launch_bins<Accumulator<T>, kMode>(p, stream);
}

template <typename T>
const char* launch_gather_cells(const Backward& p, cudaStream_t stream) {
  using A = Accumulator<T>;
  constexpr int kWidth = kElements<T>;
  const bool packs = p.grad_input.size[1] % kWidth == 0 && aligned(p.grad_output, 16) &&
                     aligned(p.grad_cells, sizeof(A) * kWidth);
  return with_packs<T>(packs, [&](auto width) {
    constexpr int V = decltype(width)::value;
    const int64_t items = element_count(p.grad_cells) / V;
    return CTXOPS_LAUNCH((gather_cells_kernel<T, V>), grid_size(divide_up(items, kThreadsAlone)),
                         kThreadsAlone, 0, stream, p);
  });
}

template <typename T>
const char* launch_spread(const Backward& p, cudaStream_t stream) {
  using A = Accumulator<T>;
  constexpr int kWidth = kElements<T>;
  const TensorView& map = p.grad_input;
  const int64_t B = map.size[0], C = map.size[1], R = p.rows.count, Q = p.columns.count;
  if (channels_inner(map)) {
    const bool packs = packs_fit<T, kWidth>(map, 1) && aligned(p.grad_cells, sizeof(A) * kWidth);
    return with_packs<T>(packs, [&](auto width) {
      constexpr int V = decltype(width)::value;
      const BlockLayout layout = channels_inner_layout(map, V, R * Q);
      const int64_t items = B * R * Q * divide_up(C, layout.lanes * V);
      return CTXOPS_LAUNCH((spread_channels_inner_kernel<T, V>),
                           grid_size(divide_up(items, layout.items)), kThreads, 0, stream, p,
                           layout);
    });
  }
  return with_packs<T>(packs_fit<T, kWidth>(map, 3), [&](auto width) {
    constexpr int V = decltype(width)::value;
    const BlockLayout layout = width_inner_layout<T>(map, R);
    const size_t bytes = layout.items * (layout.lanes * kWidth + 1) * sizeof(T);
    return CTXOPS_LAUNCH((spread_width_inner_kernel<T, V>),
                         grid_size(divide_up(B * C, layout.items) * R), kThreads, bytes, stream, p,
                         layout);
  });
}

template <typename T>
const char* backward(const Backward& p, cudaStream_t stream) {
  if (element_count(p.argmax) == 0) {
    if (const char* error = launch_gather_cells<T>(p, stream)) return error;
    return launch_spread<T>(p, stream);
  }
  if (const char* error = launch_spread<T>(p, stream)) return error;
  const int64_t items = element_count(p.grad_output);
  return CTXOPS_LAUNCH((send_maxima_kernel<T>), grid_size(divide_up(items, kThreadsAlone)),
                       kThreadsAlone, 0, stream, p);
}

}  // namespace

const char* pyramid_pool_forward(const PyramidPoolForward& params, Stream stream) {
  return dispatch(params, stream, [&](auto tag, cudaStream_t on) {
    using T = typename decltype(tag)::type;
    Forward p{params, make_cell_axis(params.input.size[2], params.sizes),
              make_cell_axis(params.input.size[3], params.sizes)};
    if (element_count(p.argmax) == 0) p.argmax.data = p.cell_argmax.data = nullptr;
    return p.maximum ? forward<T, Mode::maximum>(p, on) : forward<T, Mode::mean>(p, on);
  });
}

const char* pyramid_pool_backward(const PyramidPoolBackward& params, Stream stream) {
  return dispatch(params, stream, [&](auto tag, cudaStream_t on) {
    Backward p{params, make_cell_axis(params.grad_input.size[2], params.sizes),
               make_cell_axis(params.grad_input.size[3], params.sizes)};
    if (element_count(p.argmax) > 0) p.grad_cells.data = nullptr;
    return backward<typename decltype(tag)::type>(p, on);
  });
}

}  // namespace cuda
}  // namespace ctxops
