// SPDX-License-Identifier: Apache-2.0
//
// Forward and backward are two loops in different roles. The forward takes the products of a query
// with the keys around it, their softmax, and the sum of the values around it. The first pass of
// the backward takes the products of the gradient with the values, the softmax's derivative, and
// the sum of the keys: the same kernels. The second pass gathers for a key (a value) the queries
// (gradients) whose windows hold it. The gradient of the bias is a sum over positions, by blocks.
//
// Tiled kernels serve square windows of 3, 5 and 7, general ones everything else, with a warp for
// a position. Where windows shift, the second pass of the backward is general: near a border more
// queries than a window has see a key.
#include <cmath>
#include <utility>

#include "common/cuda.h"
#include "common/pack.h"
#include "common/warp.h"
#include "neighborhood_attention/neighborhood_attention.h"

namespace ctxops {
namespace cuda {
namespace {

// The forward (left = query, right = key, map = value, sum = output), or the first pass of the
// backward (left = grad, right = value, map = key, sum = grad_query).
struct Attend {
  TensorView left;     // (B, D, H, W)
  TensorView right;    // (B, D, H, W)
  TensorView map;      // (B, E, H, W); without memory: only the weights are wanted
  TensorView sum;      // (B, E, H, W)
  TensorView weights;  // (B, heads, K, H, W), written by the forward; without memory: not wanted
  TensorView grad_logits;  // (B, heads, K, H, W), written by the backward; no memory: forward
  Window window;
  int64_t heads;
  double scale;
  TensorView bias;  // (heads, 2 * kh - 1, 2 * kw - 1), of the forward; no memory: none

  __device__ bool backward() const { return grad_logits.data != nullptr; }
};

// The second pass of the backward: sum = grad_key (grad_value) from the queries (gradients) in
// `map`, whose coefficients are factor * grad_logits (weights).
struct Gather {
  TensorView coefficients;  // (B, heads, K, H, W)
  TensorView map;           // (B, E, H, W)
  TensorView sum;           // (B, E, H, W)
  Window window;
  int64_t heads;
  double factor;
};

// The gradient of the bias.
struct SumBias {
  TensorView grad_logits;  // (B, heads, K, H, W)
  TensorView grad_bias;    // (heads, 2 * kh - 1, 2 * kw - 1)
  Window window;
};

// A residue class of a batch element, named by its first position, and a head.
struct Place {
  int64_t b, head, top, left;
};

// One head of a map on one residue class: channels side by side on a dense grid of steps.
template <typename T>
struct Grid {
  T* data;
  int64_t row, column;

  __device__ T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

template <typename T>
__device__ Grid<T> grid_of(const TensorView& map, const Place& at, const Window& window,
                           int64_t heads) {
  return {static_cast<T*>(map.data) + at.b * map.stride[0] + at.head * (map.size[1] / heads) +
              at.top * map.stride[2] + at.left * map.stride[3],
          map.stride[2] * window.rows.dilation, map.stride[3] * window.columns.dilation};
}

// Likewise of a tensor with an entry for each of the K neighbours.
template <typename A>
struct Entries {
  A* data;  // nullptr: none
  int64_t neighbour, row, column;

  __device__ A* at(int64_t n, int64_t i, int64_t j) const {
    return data + n * neighbour + i * row + j * column;
  }
};

template <typename A>
__device__ Entries<A> entries_of(const TensorView& entries, const Place& at, const Window& window) {
  if (entries.data == nullptr) return {};
  return {static_cast<A*>(entries.data) + at.b * entries.stride[0] + at.head * entries.stride[1] +
              at.top * entries.stride[3] + at.left * entries.stride[4],
          entries.stride[2], entries.stride[3] * window.rows.dilation,
          entries.stride[4] * window.columns.dilation};
}

__device__ bool within(const StepRange& range, int64_t step) {
  return step >= range.begin && step < range.end;
}

// ------------------------------------------------------------------------------------- general

constexpr int kThreads = 256;
constexpr int kBlocks = 2;  // on a multiprocessor at least
constexpr int64_t kSharedBytes = 48 * 1024;

// A position of a class, and the window that a warp looks at from there.
struct Site {
  Place place;
  int64_t row, column;    // steps
  int64_t rows, columns;  // of the class
};

__device__ Site site_of(int64_t item, const Window& window, int64_t heads) {
  const int64_t H = window.rows.extent, W = window.columns.extent;
  const int64_t h = item / W % H, w = item % W, group = item / W / H;
  return {{group / heads, group % heads, h % window.rows.dilation, w % window.columns.dilation},
          h / window.rows.dilation,
          w / window.columns.dilation,
          class_steps(window.rows, h),
          class_steps(window.columns, w)};
}

// to[c] = sum over m < count of the coefficient times the map's channel c; visit(m, &coefficient)
// returns the neighbour's channels, or nullptr where it has no part. Lanes that are not on the
// channels of one neighbour take other neighbours.
template <int V, typename T, typename F>
__device__ void sum_neighbours(T* to /* (channels,) */, int64_t channels, int count,
                               const F& visit) {
  using A = Accumulator<T>;
  const int lane = threadIdx.x % kWarp, lanes = lanes_on(channels, V);
  for (int64_t first = 0; first < channels; first += lanes * V) {
    const int64_t c = first + lane % lanes * V;
    A sums[V] = {};
#pragma unroll 2
    for (int m = lane / lanes; c < channels && m < count; m += kWarp / lanes) {
      A coefficient;
      const T* const from = visit(m, &coefficient);
      if (from == nullptr) continue;
      const Pack<T, V> x = load_pack<V>(from + c);
#pragma unroll
      for (int e = 0; e < V; ++e) sums[e] += coefficient * x.value(e);
    }
#pragma unroll 1
    for (int mask = lanes; mask < kWarp; mask *= 2) {
#pragma unroll
      for (int e = 0; e < V; ++e) sums[e] += __shfl_xor_sync(kAllLanes, sums[e], mask);
    }
    Pack<T, V> result;
#pragma unroll
    for (int e = 0; e < V; ++e) store(&result.x[e], sums[e]);
    if (lane < lanes && c < channels) store_pack(to + c, result);
  }
}

// A warp for a query. Each keeps K accumulators in shared memory: logits, then weights, or
// gradients.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    attend_kernel(const __grid_constant__ Attend p) {
  using A = Accumulator<T>;
  CTXOPS_DYNAMIC_SHARED(A, shared);
  const WindowAxis &rows = p.window.rows, &columns = p.window.columns;
  const int kw = static_cast<int>(columns.kernel), K = static_cast<int>(rows.kernel) * kw;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  A* const mine = shared + warp * K;

  const int64_t D = p.left.size[1] / p.heads, E = p.map.size[1] / p.heads;
  const int lanes = lanes_on(D, V);
  const A scale = static_cast<A>(p.scale);
  const A outside = rows.border == Border::mask ? -static_cast<A>(INFINITY) : A(0);

  const int64_t items = p.left.size[0] * p.heads * rows.extent * columns.extent;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * warps + warp; item < items;
       item += static_cast<int64_t>(gridDim.x) * warps) {
    const Site my = site_of(item, p.window, p.heads);
    const int64_t top = window_start(rows, my.row, my.rows);
    const int64_t left = window_start(columns, my.column, my.columns);
    const StepRange in_rows = window_inside(rows, top, my.rows);
    const StepRange in_columns = window_inside(columns, left, my.columns);
    const auto inside = [&](int n) {
      return within(in_rows, top + n / kw) && within(in_columns, left + n % kw);
    };

    const T* const centre = grid_of<T>(p.left, my.place, p.window, p.heads).at(my.row, my.column);
    const Grid<T> around = grid_of<T>(p.right, my.place, p.window, p.heads);
    for (int first = 0; first < K; first += kWarp / lanes) {
      const int n = first + lane / lanes;
      const bool taken = n < K && inside(n);
      A product = 0;
      if (taken) {
        const T* const neighbour = around.at(top + n / kw, left + n % kw);
#pragma unroll 2
        for (int64_t c = lane % lanes * V; c < D; c += lanes * V) {
          const Pack<T, V> a = load_pack<V>(centre + c), b = load_pack<V>(neighbour + c);
#pragma unroll
          for (int e = 0; e < V; ++e) product += a.value(e) * b.value(e);
        }
      }
      for (int mask = lanes / 2; mask > 0; mask /= 2) {
        product += __shfl_xor_sync(kAllLanes, product, mask);
      }
      if (lane % lanes != 0 || n >= K) continue;
      mine[n] = p.backward() ? product : taken ? product * scale : outside;
    }
    __syncwarp();

    const Entries<A> weights = entries_of<A>(p.weights, my.place, p.window);
    if (p.backward()) {
      const Entries<A> grads = entries_of<A>(p.grad_logits, my.place, p.window);
      A mean = 0;
      for (int n = lane; n < K; n += kWarp) {
        mean += *weights.at(n, my.row, my.column) * mine[n];
      }
      mean = warp_sum(mean);
      for (int n = lane; n < K; n += kWarp) {
        const A weight = *weights.at(n, my.row, my.column);
        const A grad = inside(n) ? weight * (mine[n] - mean) : A(0);
        *grads.at(n, my.row, my.column) = grad;
        mine[n] = scale * grad;
      }
    } else {
      if (p.bias.data) {
        const A* const bias =
            static_cast<const A*>(p.bias.data) + my.place.head * p.bias.size[1] * p.bias.size[2];
        const int64_t first_row = top - my.row + rows.kernel - 1;
        const int64_t first_column = left - my.column + kw - 1;
        for (int n = lane; n < K; n += kWarp) {
          const int64_t row = first_row + n / kw, column = first_column + n % kw;
          if (inside(n)) mine[n] += bias[row * p.bias.size[2] + column];
        }
      }
      A largest = -static_cast<A>(INFINITY), total = 0;
      for (int n = lane; n < K; n += kWarp) largest = fmax(largest, mine[n]);
      // What fmax does with a NaN does not matter: its exponential is a NaN still.
      largest = warp_max(largest);
      for (int n = lane; n < K; n += kWarp) total += mine[n] = exponential(mine[n] - largest);
      total = warp_sum(total);
      for (int n = lane; n < K; n += kWarp) {
        mine[n] /= total;
        if (weights.data) *weights.at(n, my.row, my.column) = mine[n];
      }
    }
    __syncwarp();

    if (p.map.data) {
      const Grid<T> map = grid_of<T>(p.map, my.place, p.window, p.heads);
      T* const to = grid_of<T>(p.sum, my.place, p.window, p.heads).at(my.row, my.column);
      sum_neighbours<V>(to, E, K, [&](int n, A* coefficient) -> const T* {
        *coefficient = mine[n];
        return inside(n) ? map.at(top + n / kw, left + n % kw) : nullptr;
      });
    }
    __syncwarp();
  }
}

// A warp for a key.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gather_kernel(const __grid_constant__ Gather p) {
  using A = Accumulator<T>;
  const WindowAxis &rows = p.window.rows, &columns = p.window.columns;
  const A factor = static_cast<A>(p.factor);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t items = p.map.size[0] * p.heads * rows.extent * columns.extent;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * warps + warp; item < items;
       item += static_cast<int64_t>(gridDim.x) * warps) {
    const Site my = site_of(item, p.window, p.heads);
    const StepRange down = queries_of(rows, my.row, my.rows);
    const StepRange across = queries_of(columns, my.column, my.columns);
    const int height = static_cast<int>(down.end - down.begin);
    const int width = static_cast<int>(across.end - across.begin);
    const Entries<A> coefficients = entries_of<A>(p.coefficients, my.place, p.window);
    const Grid<T> map = grid_of<T>(p.map, my.place, p.window, p.heads);
    T* const to = grid_of<T>(p.sum, my.place, p.window, p.heads).at(my.row, my.column);
    sum_neighbours<V>(
        to, p.map.size[1] / p.heads, height * width, [&](int m, A* coefficient) -> const T* {
          const int64_t row = down.begin + m / width;
          const int64_t column = across.begin + m % width;
          const int64_t i = my.row - window_start(rows, row, my.rows);
          const int64_t j = my.column - window_start(columns, column, my.columns);
          *coefficient = factor * *coefficients.at(i * columns.kernel + j, row, column);
          return map.at(row, column);
        });
  }
}

// A block for an entry of grad_bias: warps take rows of the maps, lanes their columns. Without
// float atomics, and in double: there are as many terms as positions.
template <typename A>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_bias_kernel(const __grid_constant__ SumBias p) {
  CTXOPS_SHARED(double, of_warps, kThreads / kWarp);
  const WindowAxis &rows = p.window.rows, &columns = p.window.columns;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t height = p.grad_bias.size[1], width = p.grad_bias.size[2];
  const int64_t* const stride = p.grad_logits.stride;
  for (int64_t item = blockIdx.x; item < p.grad_bias.size[0] * height * width; item += gridDim.x) {
    const int64_t head = item / width / height;
    const int64_t down = item / width % height - (rows.kernel - 1);
    const int64_t across = item % width - (columns.kernel - 1);
    double sum = 0;
    for (int64_t w = lane; w < columns.extent; w += kWarp) {
      const int64_t j = neighbour_at(columns, w, across);
      if (j < 0) continue;
      const A* const grads = static_cast<const A*>(p.grad_logits.data) + head * stride[1] +
                             j * stride[2] + w * stride[4];
      for (int64_t row = warp; row < p.grad_logits.size[0] * rows.extent; row += warps) {
        const int64_t b = row / rows.extent, h = row % rows.extent;
        const int64_t i = neighbour_at(rows, h, down);
        if (i >= 0) sum += grads[b * stride[0] + i * columns.kernel * stride[2] + h * stride[3]];
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) of_warps[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < warps; ++i) sum += of_warps[i];
      static_cast<A*>(p.grad_bias.data)[item] = static_cast<A>(sum);
    }
    __syncthreads();
  }
}

// --------------------------------------------------------------------------------------- tiled
//
// A block takes a tile of one residue class, on which windows are dense. Its products are made in
// shared memory, where a tile of `left` and one of `right` with its halo arrive by chunks of
// channels, one chunk ahead of the arithmetic. A thread has kRows queries one below the other and
// one column of their windows: of the kRows + k - 1 neighbours that it reads, each serves up to
// kRows products. Neighbouring threads have neighbouring queries, which lie in different banks.
//
// The sums need no staging: there, neighbouring threads have neighbouring channels, so that a warp
// reads whole lines, which the queries around find in the cache, and one weight serves the warp.

constexpr int kRows = 4;     // queries of a thread
constexpr int kWidth = 4;    // channels of a pack
constexpr int kPacks = 4;    // of a chunk
constexpr int kStages = 2;   // chunks in shared memory
constexpr int kGroups = 22;  // threads' queries of a tile, at most
// So many teams share the packs of a chunk.
template <int k>
constexpr int kTeams = k == 3 ? 4 : 2;
template <int k>
constexpr int kTileThreads = (kGroups * k * kTeams<k> + kWarp - 1) / kWarp * kWarp;
// One block works while another waits. In float32 7 x 7 needs the registers of both.
template <typename T, int k>
constexpr int kTileBlocks = k == 7 && sizeof(T) > 2 ? 1 : 2;  // on a multiprocessor at least

template <typename T>
using Packed = Pack<T, kWidth>;
using Weights = Pack<float, kRows>;  // of one neighbour of each of a thread's queries

struct Tiling {
  int width, height;     // a tile; the height is a multiple of kRows
  int64_t across, down;  // tiles of a class
  int64_t classes_across, classes_down;
  int64_t tiles;  // altogether

  CTXOPS_HD int groups() const { return width * (height / kRows); }
};

// What stands at a step of a window with the query in its middle. Where windows shift, they hold at
// one end what they lack at the other: k steps away, for all queries alike. So tiles know centred
// windows alone.
template <int k, bool kShift>
__device__ int seen_at(int step, int steps) {
  if (!kShift) return step;
  return step < 0 ? step + k : step >= steps ? step - k : step;
}

__device__ bool within(int step, int steps) { return step >= 0 && step < steps; }

struct Tile {
  int64_t b;
  int head, top, left;  // as in Place
  int row, column;      // the first steps
  int rows, columns;    // of the class

  __device__ Place place() const { return {b, head, top, left}; }
};

__device__ Tile tile_of(int64_t item, const Tiling& tiling, const Window& window, int64_t heads) {
  Tile tile;
  tile.column = static_cast<int>(item % tiling.across) * tiling.width;
  item /= tiling.across;
  tile.row = static_cast<int>(item % tiling.down) * tiling.height;
  item /= tiling.down;
  tile.left = static_cast<int>(item % tiling.classes_across);
  item /= tiling.classes_across;
  tile.top = static_cast<int>(item % tiling.classes_down);
  item /= tiling.classes_down;
  tile.head = static_cast<int>(item % heads);
  tile.b = item / heads;
  tile.rows = static_cast<int>(class_steps(window.rows, tile.top));
  tile.columns = static_cast<int>(class_steps(window.columns, tile.left));
  return tile;
}

// Distance of two packs of one position in a stage. With it, the threads that write neighbouring
// packs of neighbouring positions at once meet in different banks.
template <typename T>
CTXOPS_HD int stage_pitch(int positions) {
  constexpr int kAtOnce = 128 / static_cast<int>(sizeof(Packed<T>));
  constexpr int kOffset = kAtOnce / kPacks;
  return positions + ((kOffset - positions) & (kAtOnce - 1));
}

// Of `left` the queries, of `right` what they see.
template <int k>
CTXOPS_HD int staged_positions(const Tiling& tiling) {
  return tiling.width * tiling.height + (tiling.width + k - 1) * (tiling.height + k - 1);
}

// Of their pointers in shared memory, in whole 16 bytes.
template <int k>
CTXOPS_HD int source_places(const Tiling& tiling) {
  return (staged_positions<k>(tiling) + 1) / 2 * 2;
}

template <typename T, int k>
CTXOPS_HD int stage_packs(const Tiling& tiling) {
  return kPacks * stage_pitch<T>(staged_positions<k>(tiling));
}

// Where the staged positions lie; nullptr: not in the map. To be found once for all chunks.
template <typename T, int k, bool kShift>
__device__ void find_sources(const T** sources /* (staged_positions,) */, const Tiling& tiling,
                             const Tile& tile, const Grid<T>& left, const Grid<T>& right) {
  const int queries = tiling.width * tiling.height, count = staged_positions<k>(tiling);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const bool is_query = i < queries;
    const int n = is_query ? i : i - queries, before = is_query ? 0 : k / 2;
    const int width = tiling.width + 2 * before;
    int h = tile.row + n / width - before, w = tile.column + n % width - before;
    if (!is_query) {
      h = seen_at<k, kShift>(h, tile.rows);
      w = seen_at<k, kShift>(w, tile.columns);
    }
    const bool inside = within(h, tile.rows) && within(w, tile.columns);
    sources[i] = !inside ? nullptr : is_query ? left.at(h, w) : right.at(h, w);
  }
}

// Starts to bring kPacks packs, from channel c on, of `count` positions into shared memory; zeros
// where the map has none.
template <typename T>
__device__ void stage(Packed<T>* to /* (kPacks, pitch) */, int pitch,
                      const T* const* sources /* (count,) */, int count, int c, int channels) {
  const int pack = threadIdx.x % kPacks, threads = blockDim.x / kPacks;
  c += pack * kWidth;
  to += pack * pitch;
#pragma unroll 1
  for (int i = threadIdx.x / kPacks; i < count; i += threads) {
    const T* const source = sources[i];
    if (source != nullptr && c < channels) {
      copy_async<sizeof *to>(to + i, source + c);
    } else {
      to[i] = {};
    }
  }
}

// weights[n][group].x[y] = <left, right_n> of query y of the group.
template <typename T, int k>
__device__ void multiply(Weights* weights /* (k * k, groups) */,
                         const T* const* sources /* (staged_positions,) */, const Tiling& tiling,
                         int channels) {
  Packed<T>* const stages = reinterpret_cast<Packed<T>*>(weights);  // (kStages, kPacks, pitch)
  const int width = tiling.width, around = width + k - 1, groups = tiling.groups();
  const int queries = width * tiling.height, positions = staged_positions<k>(tiling);
  const int pitch = stage_pitch<T>(positions), packs = stage_packs<T, k>(tiling);

  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread % groups, j = thread / groups % k, team = thread / groups / k;
  const int y = group / width * kRows, x = group % width;

  float sums[kRows][k] = {};
#pragma unroll 1
  for (int next = 0; next * kPacks * kWidth < channels + kPacks * kWidth; ++next) {
    const int c = next * kPacks * kWidth;
    if (c < channels) {
      stage(stages + next % kStages * packs, pitch, sources, positions, c, channels);
    }
    copy_commit();
    if (next == 0) continue;  // nothing is there to work on
    const int chunk = next - 1;
    copy_wait<kStages - 1>();
    __syncthreads();
    const Packed<T>* const from = stages + chunk % kStages * packs;
#pragma unroll 1
    for (int pack = team; team < kTeams<k> && pack < kPacks; pack += kTeams<k>) {
      const Packed<T>* const my_left = from + pack * pitch + y * width + x;
      const Packed<T>* const my_right = from + pack * pitch + queries + y * around + x + j;
      float a[kRows][kWidth];
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
        const Packed<T> loaded = my_left[q * width];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) a[q][e] = loaded.value(e);
      }
#pragma unroll
      for (int r = 0; r < kRows + k - 1; ++r) {
        const Packed<T> loaded = my_right[r * around];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const float b = loaded.value(e);
#pragma unroll
          for (int q = 0; q < kRows; ++q) {
            if (q <= r && r < q + k) sums[q][r - q] += a[q][e] * b;
          }
        }
      }
    }
    __syncthreads();
  }

  // The weights lie where the stages were: nobody reads those now.
#pragma unroll 1
  for (int turn = 0; turn < kTeams<k>; ++turn) {
    if (team == turn) {
#pragma unroll
      for (int i = 0; i < k; ++i) {
        Weights* const to = weights + (i * k + j) * groups + group;
        Weights sum;
#pragma unroll
        for (int q = 0; q < kRows; ++q) sum.x[q] = sums[q][i] + (turn > 0 ? to->x[q] : 0);
        *to = sum;
      }
    }
    __syncthreads();
  }
}

// The products of one query become its weights, or the gradients of its logits.
template <int k, bool kShift>
__device__ void weigh(Weights* weights /* (k * k, groups) */, int groups, const Attend& p,
                      const Tile& tile, int row, int column, int group, int q) {
  const int top = static_cast<int>(window_start(p.window.rows, row, tile.rows));
  const int left = static_cast<int>(window_start(p.window.columns, column, tile.columns));
  const auto row_of = [&](int i) { return seen_at<k, kShift>(row - k / 2 + i, tile.rows); };
  const auto column_of = [&](int j) {
    return seen_at<k, kShift>(column - k / 2 + j, tile.columns);
  };
  // Which neighbour of the window that is.
  const auto neighbour = [&](int i, int j) {
    return kShift ? (row_of(i) - top) * k + column_of(j) - left : i * k + j;
  };
  const Entries<float> entries = entries_of<float>(p.weights, tile.place(), p.window);
  const float scale = static_cast<float>(p.scale);
  // f(i, x, inside) may change the products x[j] of row i of the window, and is told which of them
  // are inside. All rows at once would need more registers than there are; one at a time, a row's
  // loads do not wait for the stores before them.
  const auto each_row = [&](const auto& f) {
#pragma unroll 1
    for (int i = 0; i < k; ++i) {
      float x[k];
      bool inside[k];
#pragma unroll
      for (int j = 0; j < k; ++j) {
        x[j] = weights[(i * k + j) * groups + group].x[q];
        inside[j] = within(row_of(i), tile.rows) && within(column_of(j), tile.columns);
      }
      f(i, x, inside);
#pragma unroll
      for (int j = 0; j < k; ++j) weights[(i * k + j) * groups + group].x[q] = x[j];
    }
  };
  const auto load_entries = [&](int i, const bool (&inside)[k], float (&to)[k]) {
#pragma unroll
    for (int j = 0; j < k; ++j) to[j] = inside[j] ? *entries.at(neighbour(i, j), row, column) : 0;
  };
  float total = 0;
  if (p.backward()) {
    const Entries<float> grads = entries_of<float>(p.grad_logits, tile.place(), p.window);
    each_row([&](int i, const float (&x)[k], const bool (&inside)[k]) {
      float weight[k];
      load_entries(i, inside, weight);
#pragma unroll
      for (int j = 0; j < k; ++j) {
        if (inside[j]) total += weight[j] * x[j];
      }
    });
    each_row([&](int i, float (&x)[k], const bool (&inside)[k]) {
      float weight[k];
      load_entries(i, inside, weight);
#pragma unroll
      for (int j = 0; j < k; ++j) x[j] = inside[j] ? weight[j] * (x[j] - total) : 0;
#pragma unroll
      for (int j = 0; j < k; ++j) *grads.at(neighbour(i, j), row, column) = x[j];
#pragma unroll
      for (int j = 0; j < k; ++j) x[j] *= scale;
    });
  } else {
    const float outside = p.window.rows.border == Border::mask ? -INFINITY : 0.0f;
    float largest = -INFINITY;
    const auto take = [&](const auto& logit) {
      each_row([&](int i, float (&x)[k], const bool (&inside)[k]) {
#pragma unroll
        for (int j = 0; j < k; ++j) {
          x[j] = inside[j] ? logit(x[j] * scale, i, j) : outside;
          largest = fmaxf(largest, x[j]);
        }
      });
    };
    if (p.bias.data == nullptr) {
      take([](float product, int, int) { return product; });
    } else {
      // The middle entry is the query's own.
      constexpr int kAcross = 2 * k - 1;
      const float* const bias = static_cast<const float*>(p.bias.data) +
                                tile.head * kAcross * kAcross + (k - 1) * (kAcross + 1);
      take([&](float product, int i, int j) {
        return product + bias[(row_of(i) - row) * kAcross + column_of(j) - column];
      });
    }
    each_row([&](int, float (&x)[k], const bool (&)[k]) {
#pragma unroll
      for (int j = 0; j < k; ++j) total += x[j] = expf(x[j] - largest);
    });
    each_row([&](int i, float (&x)[k], const bool (&)[k]) {
#pragma unroll
      for (int j = 0; j < k; ++j) x[j] /= total;
      if (entries.data == nullptr) return;
#pragma unroll
      for (int j = 0; j < k; ++j) *entries.at(neighbour(i, j), row, column) = x[j];
    });
  }
}

// sum = the neighbours in `map`, weighted. Neighbours outside count as zeros.
template <typename T, int k, bool kShift>
__device__ void add_up(const Weights* weights /* (k * k, groups) */, const Tiling& tiling,
                       const Tile& tile, const Grid<T>& map, const Grid<T>& sum, int channels) {
  const int groups = tiling.groups(), packs = channels / kWidth;
  for (int item = threadIdx.x; item < groups * packs; item += blockDim.x) {
    const int group = item / packs, c = item % packs * kWidth;
    const int row = tile.row + group / tiling.width * kRows;
    const int column = tile.column + group % tiling.width;
    if (row >= tile.rows || column >= tile.columns) continue;
    const T* const neighbours = map.at(row - k / 2, 0) + c;
    T* to = sum.at(row, column) + c;
    float sums[kRows][kWidth] = {};
#pragma unroll 1
    for (int j = 0; j < k; ++j) {
      const int w = seen_at<k, kShift>(column + j - k / 2, tile.columns);
      if (!within(w, tile.columns)) continue;
      Weights mine[k];
#pragma unroll
      for (int i = 0; i < k; ++i) mine[i] = weights[(i * k + j) * groups + group];
      const T* from = neighbours + w * map.column;
#pragma unroll
      for (int r = 0; r < kRows + k - 1; ++r) {
        const int h = row + r - k / 2, seen = seen_at<k, kShift>(h, tile.rows);
        Packed<T> loaded = {};
        if (within(seen, tile.rows)) loaded = load_pack<kWidth>(from + (seen - h) * map.row);
        from += map.row;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const float x = loaded.value(e);
#pragma unroll
          for (int q = 0; q < kRows; ++q) {
            if (q <= r && r < q + k) sums[q][e] += mine[r - q].x[q] * x;
          }
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      if (row + q >= tile.rows) break;
      Packed<T> result;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) store(&result.x[e], sums[q][e]);
      store_pack(to, result);
      to += sum.row;
    }
  }
}

// Where windows shift, two blocks of the largest size would spill registers.
template <typename T, int k, bool kShift>
__global__ void __launch_bounds__(kTileThreads<k>, kShift ? 1 : kTileBlocks<T, k>)
    attend_tiles_kernel(const __grid_constant__ Attend p, const __grid_constant__ Tiling tiling) {
  CTXOPS_DYNAMIC_SHARED(const T*, sources);
  Weights* const weights = reinterpret_cast<Weights*>(sources + source_places<k>(tiling));
  const int groups = tiling.groups();
  for (int64_t item = blockIdx.x; item < tiling.tiles; item += gridDim.x) {
    const Tile tile = tile_of(item, tiling, p.window, p.heads);
    if (tile.row >= tile.rows || tile.column >= tile.columns) continue;  // a shorter class
    find_sources<T, k, kShift>(sources, tiling, tile,
                               grid_of<T>(p.left, tile.place(), p.window, p.heads),
                               grid_of<T>(p.right, tile.place(), p.window, p.heads));
    __syncthreads();  // the weights of the last tile have been read, too
    multiply<T, k>(weights, sources, tiling, static_cast<int>(p.left.size[1] / p.heads));

    // Each query has a thread: a block has at least k > kRows / 2 of them, twice, for a group.
    const int group = threadIdx.x / kRows, q = threadIdx.x % kRows;
    const int row = tile.row + group / tiling.width * kRows + q;
    const int column = tile.column + group % tiling.width;
    if (group < groups && row < tile.rows && column < tile.columns) {
      weigh<k, kShift>(weights, groups, p, tile, row, column, group, q);
    }
    __syncthreads();
    if (p.map.data) {
      add_up<T, k, kShift>(weights, tiling, tile,
                           grid_of<T>(p.map, tile.place(), p.window, p.heads),
                           grid_of<T>(p.sum, tile.place(), p.window, p.heads),
                           static_cast<int>(p.map.size[1] / p.heads));
    }
  }
}

// The windows that hold a key are, for odd windows that do not shift, those of the positions in
// the window around the key; there the key is neighbour k * k - 1 - n.
template <typename T, int k>
__global__ void __launch_bounds__(kTileThreads<k>, kTileBlocks<T, k>)
    gather_tiles_kernel(const __grid_constant__ Gather p, const __grid_constant__ Tiling tiling) {
  CTXOPS_DYNAMIC_SHARED(Weights, weights);
  const int groups = tiling.groups();
  for (int64_t item = blockIdx.x; item < tiling.tiles; item += gridDim.x) {
    const Tile tile = tile_of(item, tiling, p.window, p.heads);
    if (tile.row >= tile.rows || tile.column >= tile.columns) continue;  // a shorter class
    const Entries<float> coefficients = entries_of<float>(p.coefficients, tile.place(), p.window);
    const float factor = static_cast<float>(p.factor);
    for (int i = threadIdx.x; i < k * k * groups * kRows; i += blockDim.x) {
      const int q = i % kRows, group = i / kRows % groups, n = i / kRows / groups;
      const int row = tile.row + group / tiling.width * kRows + q + n / k - k / 2;
      const int column = tile.column + group % tiling.width + n % k - k / 2;
      const bool inside = row >= 0 && row < tile.rows && column >= 0 && column < tile.columns;
      weights[n * groups + group].x[q] =
          inside ? factor * *coefficients.at(k * k - 1 - n, row, column) : 0;
    }
    __syncthreads();
    add_up<T, k, false>(weights, tiling, tile, grid_of<T>(p.map, tile.place(), p.window, p.heads),
                        grid_of<T>(p.sum, tile.place(), p.window, p.heads),
                        static_cast<int>(p.map.size[1] / p.heads));
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------ launches

// Can all channels of a head be moved in packs of V?
template <typename T, int V>
bool heads_in_packs(const TensorView& map, int64_t heads) {
  return map.data == nullptr || (packs_fit<T, V>(map, 1) && map.size[1] / heads % V == 0);
}

template <typename T, int k>
int64_t tile_bytes(const Tiling& tiling) {
  const int64_t sources = source_places<k>(tiling) * sizeof(const T*);
  const int64_t stages = kStages * stage_packs<T, k>(tiling) * sizeof(Packed<T>);
  const int64_t weights = k * k * tiling.groups() * sizeof(Weights);
  return sources + (stages > weights ? stages : weights);
}

// Tiles count steps and channels in 32 bits.
constexpr int64_t kLongAxis = 1 << 24;

// Estimates, in products of two packs: what the read of a position into shared memory takes, and
// how much work a multiprocessor needs not to wait for memory.
constexpr int64_t kRead = 8;
constexpr int64_t kBusy = 5000;

// The tiles of `maps` maps: the busiest multiprocessor shall have little to do, and then all of
// them little to read. The results do not depend on the choice.
template <typename T, int k>
Tiling make_tiling(const Window& window, int64_t maps) {
  const int64_t rows = class_steps(window.rows, 0), columns = class_steps(window.columns, 0);
  const int64_t blocks = kTileBlocks<T, k>, at_once = blocks * multiprocessors();
  Tiling best = {};
  std::pair<int64_t, int64_t> best_cost = {INT64_MAX, 0};
  for (int down = 1; down * kRows < rows + kRows && down <= kGroups; ++down) {
    for (int width = 1; width <= columns && width * down <= kGroups; ++width) {
      Tiling t = {};
      t.width = width;
      t.height = down * kRows;
      t.across = divide_up(columns, t.width);
      t.down = divide_up(rows, t.height);
      t.classes_down = smaller(window.rows.dilation, window.rows.extent);
      t.classes_across = smaller(window.columns.dilation, window.columns.extent);
      t.tiles = maps * t.classes_down * t.classes_across * t.down * t.across;
      const int64_t queries = t.width * t.height;
      const int64_t read = queries + (t.width + k - 1) * (t.height + k - 1);
      const int64_t work = blocks * (k * k * queries + kRead * read);
      const std::pair<int64_t, int64_t> cost = {
          divide_up(t.tiles, at_once) * (work > kBusy ? work : kBusy), t.tiles * read};
      if (cost >= best_cost || tile_bytes<T, k>(t) > kSharedBytes) continue;
      best = t;
      best_cost = cost;
    }
  }
  return best;
}

// Can tiles move this map?
template <typename T>
bool tileable(const TensorView& map, int64_t heads) {
  return map.data == nullptr ||
         (map.size[1] > 0 && map.size[1] < kLongAxis && heads_in_packs<T, kWidth>(map, heads));
}

// A tile of fewer positions than this leaves most of a block idle.
constexpr int64_t kFewPositions = 16;

bool tileable(const Window& window) {
  const int64_t k = window.rows.kernel;
  return window.columns.kernel == k && (k == 3 || k == 5 || k == 7) &&
         window.rows.extent < kLongAxis && window.columns.extent < kLongAxis &&
         class_steps(window.rows, 0) * class_steps(window.columns, 0) >= kFewPositions;
}

// f(k, tiling, threads) for the size of a square window.
template <typename T, typename F>
const char* with_tiling(const Window& window, int64_t maps, const F& f) {
  const auto call = [&](auto size) {
    constexpr int k = decltype(size)::value;
    const Tiling tiling = make_tiling<T, k>(window, maps);
    const int64_t threads = tiling.groups() * k * kTeams<k>;
    return f(size, tiling, static_cast<unsigned>(divide_up(threads, kWarp) * kWarp));
  };
  switch (window.rows.kernel) {
    case 3: return call(std::integral_constant<int, 3>{});
    case 5: return call(std::integral_constant<int, 5>{});
    default: return call(std::integral_constant<int, 7>{});
  }
}

template <typename T>
const char* attend(const Attend& p, cudaStream_t stream) {
  const int64_t maps = p.left.size[0] * p.heads;
  if constexpr (sizeof(T) < sizeof(double)) {
    if (tileable(p.window) && tileable<T>(p.left, p.heads) && tileable<T>(p.right, p.heads) &&
        tileable<T>(p.map, p.heads) && tileable<T>(p.sum, p.heads)) {
      return with_tiling<T>(p.window, maps, [&](auto size, const Tiling& t, unsigned threads) {
        constexpr int k = decltype(size)::value;
        const unsigned blocks = grid_size(t.tiles);
        const int64_t bytes = tile_bytes<T, k>(t);
        if (p.window.rows.border == Border::shift) {
          return CTXOPS_LAUNCH((attend_tiles_kernel<T, k, true>), blocks, threads, bytes, stream, p,
                               t);
        }
        return CTXOPS_LAUNCH((attend_tiles_kernel<T, k, false>), blocks, threads, bytes, stream, p,
                             t);
      });
    }
  }
  constexpr int V = kElements<T>;
  const bool packs = heads_in_packs<T, V>(p.left, p.heads) &&
                     heads_in_packs<T, V>(p.right, p.heads) &&
                     heads_in_packs<T, V>(p.map, p.heads) && heads_in_packs<T, V>(p.sum, p.heads);
  const int64_t bytes = p.window.rows.kernel * p.window.columns.kernel * sizeof(Accumulator<T>);
  const int64_t warps = smaller(kThreads / kWarp, kSharedBytes / bytes);
  const int64_t items = maps * p.left.size[2] * p.left.size[3];
  return with_packs<T>(packs, [&](auto width) {
    return CTXOPS_LAUNCH((attend_kernel<T, decltype(width)::value>),
                         grid_size(divide_up(items, warps)), static_cast<unsigned>(warps * kWarp),
                         warps * bytes, stream, p);
  });
}

template <typename T>
const char* gather(const Gather& p, cudaStream_t stream) {
  const int64_t maps = p.map.size[0] * p.heads;
  if constexpr (sizeof(T) < sizeof(double)) {
    if (p.window.rows.border != Border::shift && tileable(p.window) &&
        tileable<T>(p.map, p.heads) && tileable<T>(p.sum, p.heads)) {
      return with_tiling<T>(p.window, maps, [&](auto size, const Tiling& t, unsigned threads) {
        constexpr int k = decltype(size)::value;
        return CTXOPS_LAUNCH((gather_tiles_kernel<T, k>), grid_size(t.tiles), threads,
                             k * k * t.groups() * sizeof(Weights), stream, p, t);
      });
    }
  }
  constexpr int V = kElements<T>;
  const bool packs = heads_in_packs<T, V>(p.map, p.heads) && heads_in_packs<T, V>(p.sum, p.heads);
  const int64_t items = maps * p.map.size[2] * p.map.size[3];
  return with_packs<T>(packs, [&](auto width) {
    return CTXOPS_LAUNCH((gather_kernel<T, decltype(width)::value>),
                         grid_size(divide_up(items, kThreads / kWarp)), kThreads, 0, stream, p);
  });
}

// Without elements: not there.
TensorView if_any(TensorView view) {
  if (element_count(view) == 0) view.data = nullptr;
  return view;
}

}  // namespace

const char* neighborhood_attention_forward(const NeighborhoodAttentionForward& params,
                                           Stream stream) {
  return dispatch(params, stream, [&](auto tag, cudaStream_t on) {
    const Attend p{params.query,           params.key,
                   if_any(params.value),   if_any(params.output),
                   if_any(params.weights), {},
                   window_of(params),      params.num_heads,
                   params.scale,           if_any(params.bias)};
    return attend<typename decltype(tag)::type>(p, on);
  });
}

const char* neighborhood_attention_backward(const NeighborhoodAttentionBackward& params,
                                            Stream stream) {
  return dispatch(params, stream, [&](auto tag, cudaStream_t on) {
    using T = typename decltype(tag)::type;
    const Window window = window_of(params);
    const int64_t heads = params.num_heads;
    const Attend to_query{
        params.grad,        params.value, params.key, params.grad_query, params.weights,
        params.grad_logits, window,       heads,      params.scale,      {}};
    const Gather to_key{params.grad_logits, params.query, params.grad_key, window, heads,
                        params.scale};
    const Gather to_value{params.weights, params.grad, params.grad_value, window, heads, 1};
    const char* error = attend<T>(to_query, on);
    if (error == nullptr) error = gather<T>(to_key, on);
    if (error == nullptr) error = gather<T>(to_value, on);
    const int64_t entries = element_count(params.grad_bias);
    if (error != nullptr || entries == 0) return error;
    return CTXOPS_LAUNCH((sum_bias_kernel<Accumulator<T>>), grid_size(entries), kThreads, 0, on,
                         SumBias{params.grad_logits, params.grad_bias, window});
  });
}

}  // namespace cuda
}  // namespace ctxops
