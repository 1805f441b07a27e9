// SPDX-License-Identifier: Apache-2.0
//
// A warp takes a cell and one of the classes among its pixels at a time, in ascending order: its
// lanes share the channels, or the pixels. With directions, a first kernel writes a of every pixel.
// Then a block takes a part of the cells: its warps turn them into terms, each a class and the
// coefficients of the four corners. In the order of their classes these are dealt to teams, whose
// threads, each with a channel of its own, add them. Of a class that two teams have, the first one
// sums into memory and the other hands on: the order of the additions is always the same.
#include <cmath>

#include "category_statistics/category_statistics.h"
#include "common/cuda.h"
#include "common/pack.h"
#include "common/warp.h"

namespace ctxops {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 3;  // on a multiprocessor at a time
// Of the kernel that sums.
constexpr int kSumThreads = 512;
constexpr int kSumWarps = kSumThreads / kWarp;
constexpr int kSumBlocks = 2;
constexpr int kTerms = 4 * kSumWarps;  // that a block makes and adds between two barriers
// All blocks of a part make its terms, so that they have as many channels as they have threads,
// unless there were fewer blocks than this: about one for each multiprocessor of a large GPU. No
// property of the device, so that sums are the same on every one.
constexpr int64_t kBusyBlocks = 128;
// Terms whose features a thread loads before it adds them: as many as its registers hold.
template <typename T>
constexpr int kAtOnce = sizeof(T) < 8 ? 2 : 1;

constexpr int32_t kNone = INT32_MAX;  // behind every class

struct Problem {
  TensorView features, labels;
  const double* directions;  // (K, C), or nullptr: every pixel weighs 1
  void* scratch;             // (B, H, W) accumulator: a
  double *part_sums, *part_weights;
  int64_t *part_counts, *outside;
  int64_t parts, classes, channels, cells, ignore_index;
  ResizeAxis down, across;
};

// Where a cell's corners lie in the features: the upper left one, and from a corner to the one
// beside and below it; 0 where the cell ends with its position.
struct Corners {
  int64_t at, right, below;

  __device__ int64_t offset(int corner) const {
    return at + (corner % 2 == 0 ? 0 : right) + (corner < 2 ? 0 : below);
  }
};

struct Cell {
  int64_t y, x;       // its upper left corner
  int b;              // its image
  int top, left;      // of its pixels
  int rows, columns;  // likewise, perhaps none

  __device__ Corners corners(const Problem& p) const {
    const int64_t* const stride = p.features.stride;
    const bool has_right = x + 1 < p.features.size[3] && step_of(p.across) > 0;
    const bool has_below = y + 1 < p.features.size[2] && step_of(p.down) > 0;
    return {b * stride[0] + y * stride[2] + x * stride[3], has_right ? stride[3] : 0,
            has_below ? stride[2] : 0};
  }
};

// A warp calls it.
__device__ Cell cell_at(const Problem& p, int64_t number) {
  const int64_t h = p.features.size[2], w = p.features.size[3];
  const int64_t row = number / w, x = number - row * w, b = row / h, y = row - b * h;
  // Four lanes look for a side each.
  const int lane = lane_of_thread();
  const ResizeAxis& axis = lane % 4 < 2 ? p.down : p.across;
  const int side = static_cast<int>(first_target(axis, (lane % 4 < 2 ? y : x) + lane % 2));
  const int top = __shfl_sync(kAllLanes, side, 0), bottom = __shfl_sync(kAllLanes, side, 1);
  const int left = __shfl_sync(kAllLanes, side, 2), right = __shfl_sync(kAllLanes, side, 3);
  return {y, x, static_cast<int>(b), top, left, bottom - top, right - left};
}

// The label with that number of elements in front of it.
__device__ int64_t load_label(const void* labels, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::uint8: return static_cast<const uint8_t*>(labels)[offset];
    case DType::int8: return static_cast<const int8_t*>(labels)[offset];
    case DType::int16: return static_cast<const int16_t*>(labels)[offset];
    case DType::int32: return static_cast<const int32_t*>(labels)[offset];
    default: return static_cast<const int64_t*>(labels)[offset];
  }
}

// f(label, Y, X) for the lane's share of the cell's pixels.
template <typename F>
__device__ void for_pixels(const Problem& p, const Cell& cell, const F& f) {
  if (cell.columns == 0) return;
  const int64_t* const stride = p.labels.stride;
#pragma unroll 1  // registers are few
  for (Walk walk(lane_of_thread(), kWarp, cell.columns); walk.row() < cell.rows; walk.next()) {
    const int64_t Y = cell.top + walk.row(), X = cell.left + walk.column();
    f(load_label(p.labels.data, p.labels.dtype, cell.b * stride[0] + Y * stride[1] + X * stride[2]),
      Y, X);
  }
}

__device__ int32_t class_of(const Problem& p, int64_t label) {
  const bool is_class = label != p.ignore_index && label >= 0 && label < p.classes;
  return is_class ? static_cast<int32_t>(label) : kNone;
}

// The first class of the cell; kNone: it has none. Counts the labels that are neither a class nor
// ignored in p.outside, if that is wanted. A warp calls it.
__device__ int32_t first_class(const Problem& p, const Cell& cell, bool counts_outside) {
  int32_t first = kNone;
  int count = 0;
  for_pixels(p, cell, [&](int64_t label, int64_t, int64_t) {
    const int32_t k = class_of(p, label);
    first = k < first ? k : first;
    count += k == kNone && label != p.ignore_index;
  });
  if (counts_outside && count > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(p.outside), count);
  }
  return warp_min(first);
}

// f(Y, X) for the lane's share of the cell's pixels of class k. Returns the cell's next class. A
// warp calls it.
template <typename F>
__device__ int32_t for_pixels_of(const Problem& p, const Cell& cell, int32_t k, const F& f) {
  int32_t next = kNone;
  for_pixels(p, cell, [&](int64_t label, int64_t Y, int64_t X) {
    const int32_t other = class_of(p, label);
    if (other == k) f(Y, X);
    if (other > k && other < next) next = other;
  });
  return warp_min(next);
}

// The element of p.scratch that belongs to a pixel.
__device__ int64_t scratch_at(const Problem& p, const Cell& cell, int64_t Y, int64_t X) {
  return (cell.b * p.labels.size[1] + Y) * p.labels.size[2] + X;
}

// Where a pixel lies in its cell: how far down and across, from 0 to 1.
struct Inside {
  double v, u;
};

__device__ Inside inside(const Problem& p, const Cell& cell, int64_t Y, int64_t X) {
  return {source_of(p.down, Y) - cell.y, source_of(p.across, X) - cell.x};
}

// Nothing is summed yet.
__global__ void __launch_bounds__(kThreads) clear_kernel(const __grid_constant__ Problem p) {
  const int64_t rows = p.parts * p.classes;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = thread; i < rows * p.channels; i += threads) p.part_sums[i] = 0;
  for (int64_t i = thread; i < rows; i += threads) {
    p.part_weights[i] = 0;
    p.part_counts[i] = 0;
  }
  if (thread < 2) p.outside[thread] = 0;
}

// a of every pixel that has a class.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    weights_kernel(const __grid_constant__ Problem p) {
  const T* const features = static_cast<const T*>(p.features.data);
  Accumulator<T>* const scratch = static_cast<Accumulator<T>*>(p.scratch);
  const int64_t C = p.channels;
  for (int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
       number < p.cells; number += static_cast<int64_t>(gridDim.x) * kWarps) {
    const Cell cell = cell_at(p, number);
    const Corners corners = cell.corners(p);
    // |r|^2 is a quadratic of u, its coefficients are quadratics of v: the sums of (1 - t)^2,
    // 2 (1 - t) t and t^2 times what is [v][u] here, <f, f'> of two corners or the mean of two
    // such. The weights are positive and add up to 1: where neighbours cancel, the square is off by
    // a few roundings of the largest <f, f>, as a sum over the shares is, and by no more.
    double square[3][3] = {};
    bool measured = false;
    for (int32_t k = first_class(p, cell, false); k != kNone;) {
      const double* const m = p.directions + k * C;  // (C,)
      double along[4] = {};                          // <f, m>
#pragma unroll 1                                     // the sums take the registers
      for (int64_t c = lane_of_thread(); c < C; c += kWarp) {
        double f[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) f[i] = load(features[corners.offset(i) + c]);
#pragma unroll
        for (int i = 0; i < 4; ++i) along[i] += f[i] * m[c];
        if (measured) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // a row of corners, a column
          square[2 * i][0] += f[2 * i] * f[2 * i];
          square[2 * i][1] += f[2 * i] * f[2 * i + 1];
          square[2 * i][2] += f[2 * i + 1] * f[2 * i + 1];
          square[1][2 * i] += f[i] * f[i + 2];
        }
        square[1][1] += f[0] * f[3] + f[1] * f[2];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) along[i] = warp_sum(along[i]);
#pragma unroll
      for (int n = 0; n < 9 && !measured; ++n)
        square[n / 3][n % 3] = warp_sum(square[n / 3][n % 3]);
      if (!measured) square[1][1] *= 0.5;
      measured = true;

      k = for_pixels_of(p, cell, k, [&](int64_t Y, int64_t X) {
        const auto [v, u] = inside(p, cell, Y, X);
        const double dot =
            (1 - v) * ((1 - u) * along[0] + u * along[1]) + v * ((1 - u) * along[2] + u * along[3]);
        const double of_u[3] = {(1 - u) * (1 - u), 2 * (1 - u) * u, u * u};
        double of_v[3];
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          of_v[i] = of_u[0] * square[i][0] + of_u[1] * square[i][1] + of_u[2] * square[i][2];
        }
        const double length =
            (1 - v) * (1 - v) * of_v[0] + 2 * (1 - v) * v * of_v[1] + v * v * of_v[2];
        // Of an inexact square; written so that NaN stays.
        double norm = sqrt(length < 0 ? 0 : length);
        norm = norm < kShortest ? kShortest : norm;
        scratch[scratch_at(p, cell, Y, X)] = static_cast<Accumulator<T>>(weight_of(dot / norm));
      });
    }
  }
}

// What the pixels of class k in a cell contribute.
struct Term {
  int32_t k;  // kNone: nothing
  Corners corners;
  double coefficient[4];  // of the corners
  int64_t count;          // of the pixels
};

// The terms of every kSumWarps-th cell of a range. A warp has one.
template <typename A>
class Terms {
 public:
  __device__ Terms(const Problem& p, Span cells, bool counts_outside)
      : p_(p),
        number_(cells.begin + warp_of_thread()),
        end_(cells.end),
        counts_outside_(counts_outside) {}

  // To be called first, and where other things than next() were called: registers are few, so that
  // the cell is not kept.
  __device__ void resume() { cell_ = k_ == kNone ? Cell{} : cell_at(p_, number_ - kSumWarps); }

  __device__ Term next() {
    while (k_ == kNone && number_ < end_) {
      cell_ = cell_at(p_, number_);
      number_ += kSumWarps;
      k_ = first_class(p_, cell_, counts_outside_);
    }
    Term term = {};
    term.k = k_;
    if (k_ == kNone) return term;
    int count = 0;  // of the lane
    k_ = for_pixels_of(p_, cell_, k_, [&](int64_t Y, int64_t X) {
      double a = 1;
      if (p_.directions != nullptr)
        a = static_cast<const A*>(p_.scratch)[scratch_at(p_, cell_, Y, X)];
      const auto [v, u] = inside(p_, cell_, Y, X);
      const double above = a * (1 - v), below = a * v;
      term.coefficient[0] += above * (1 - u);
      term.coefficient[1] += above * u;
      term.coefficient[2] += below * (1 - u);
      term.coefficient[3] += below * u;
      ++count;
    });
#pragma unroll
    for (int i = 0; i < 4; ++i) term.coefficient[i] = warp_sum(term.coefficient[i]);
    term.count = warp_sum<int64_t>(count);
    term.corners = cell_.corners(p_);
    return term;
  }

 private:
  const Problem& p_;
  int64_t number_, end_;
  const bool counts_outside_;
  Cell cell_ = {};
  int32_t k_ = kNone;  // of the next term
};

// The sums of a part. A block has so many channels, a team each of them.
template <typename T>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    sums_kernel(const __grid_constant__ Problem p, const int lanes) {
  CTXOPS_SHARED(Term, terms, kTerms);
  CTXOPS_SHARED(int32_t, class_of_term, kTerms);
  CTXOPS_SHARED(int32_t, classes, kTerms);  // in ascending order,
  CTXOPS_SHARED(int32_t, order, kTerms);    // and the terms that they belong to
  CTXOPS_SHARED(int32_t, count_of_terms, 1);
  CTXOPS_SHARED(double, handed_on, kSumThreads);
  const T* const features = static_cast<const T*>(p.features.data);
  const int64_t C = p.channels, K = p.classes, tiles = divide_up(C, lanes);
  const int thread = static_cast<int>(threadIdx.x);
  const int team = thread / lanes, teams = kSumThreads / lanes;
  for (int64_t item = blockIdx.x; item < p.parts * tiles; item += gridDim.x) {
    const int part = static_cast<int>(item / tiles);
    const int64_t c = item % tiles * lanes + (thread & (lanes - 1));
    const Span cells = span_of_part(part, p.parts, p.cells);
    Terms<Accumulator<T>> own(p, cells, c < lanes);
    for (bool more = true; more;) {
      own.resume();
      for (int i = warp_of_thread(); i < kTerms; i += kSumWarps) {
        const Term term = own.next();
        if (lane_of_thread() == 0) {
          terms[i] = term;
          class_of_term[i] = term.k;
        }
      }
      __syncthreads();

      if (thread < kTerms) {
        const int32_t k = class_of_term[thread];
        int place = 0, count = 0;
#pragma unroll 8
        for (int i = 0; i < kTerms; ++i) {
          const int32_t other = class_of_term[i];
          place += other < k || (other == k && i < thread);
          count += other != kNone;
        }
        classes[place] = k;
        order[place] = thread;
        if (thread == 0) count_of_terms[0] = count;
      }
      __syncthreads();

      const int count = count_of_terms[0];
      const auto begin_of = [&](int team) { return team * lanes * count / kSumThreads; };
      // Does a team go on with the last class of the one in front?
      const auto goes_on = [&](int team) {
        const int begin = begin_of(team);
        return begin > 0 && begin < begin_of(team + 1) && classes[begin - 1] == classes[begin];
      };
      const int end = c < C ? begin_of(team + 1) : 0;
      bool hands_on = goes_on(team);
      double sum = 0;
      int32_t k = kNone;  // whose sum
      const auto keep = [&] {
        if (hands_on) {
          handed_on[thread] = sum;
        } else {
          p.part_sums[(part * K + k) * C + c] += sum;
        }
        hands_on = false;
      };
      for (int first = begin_of(team); first < end; first += kAtOnce<T>) {
        T f[kAtOnce<T>][4];
#pragma unroll
        for (int n = 0; n < kAtOnce<T>; ++n) {
          if (first + n >= end) continue;
          const Corners& corners = terms[order[first + n]].corners;
#pragma unroll
          for (int i = 0; i < 4; ++i) f[n][i] = features[corners.offset(i) + c];
        }
#pragma unroll
        for (int n = 0; n < kAtOnce<T>; ++n) {
          if (first + n >= end) continue;
          if (classes[first + n] != k) {
            if (k != kNone) keep();
            k = classes[first + n];
            sum = 0;
          }
          const Term& term = terms[order[first + n]];
#pragma unroll
          for (int i = 0; i < 4; ++i) sum += term.coefficient[i] * load(f[n][i]);
        }
      }
      if (k != kNone) keep();

      // The first term of a class: the shares of a pixel add up to 1.
      if (c < lanes && thread < count && (thread == 0 || classes[thread - 1] != classes[thread])) {
        double weight = 0;
        int64_t pixels = 0;
        for (int n = thread; n < count && classes[n] == classes[thread]; ++n) {
          const Term& term = terms[order[n]];
          for (const double coefficient : term.coefficient) weight += coefficient;
          pixels += term.count;
        }
        p.part_weights[part * K + classes[thread]] += weight;
        p.part_counts[part * K + classes[thread]] += pixels;
      }
      more = false;  // a warp that has more has filled the last of its places
      for (int i = kTerms - kSumWarps; i < kTerms; ++i) more = more || class_of_term[i] != kNone;
      __syncthreads();

      for (int other = 1; team == 0 && c < C && other < teams; ++other) {
        if (goes_on(other))
          p.part_sums[(part * K + classes[begin_of(other)]) * C + c] +=
              handed_on[other * lanes + thread];
      }
    }
  }
}

// The results from the parts. Of a class, the channels, the weight and the count are C + 2 columns;
// a block takes as many as a warp has lanes.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const __grid_constant__ Problem p, A* sums /* (K, C) */, A* weights /* (K,) */,
                     int64_t* counts /* (K,) */) {
  CTXOPS_SHARED(double, partial, kThreads);
  const int64_t C = p.channels, K = p.classes, tiles = divide_up(C + 2, kWarp);
  for (int64_t item = blockIdx.x; item < K * tiles; item += gridDim.x) {
    const int64_t k = item / tiles, c = item % tiles * kWarp + lane_of_thread();
    const Span parts = span_of_part(warp_of_thread(), kWarps, p.parts);
    double sum = 0;
#pragma unroll 4
    for (int64_t part = parts.begin; part < parts.end; ++part) {
      const int64_t row = part * K + k;
      if (c < C) sum += p.part_sums[row * C + c];
      if (c == C) sum += p.part_weights[row];
      if (c == C + 1) sum += static_cast<double>(p.part_counts[row]);
    }
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (warp_of_thread() == 0) {
      for (int i = 1; i < kWarps; ++i) sum += partial[i * kWarp + threadIdx.x];
      if (c == C + 1) counts[k] = static_cast<int64_t>(sum);
      if (p.outside[0] > 0) sum = NAN;
      if (c < C) sums[k * C + c] = static_cast<A>(sum);
      if (c == C) weights[k] = static_cast<A>(sum);
    }
    __syncthreads();
  }
}

Problem make_problem(const CategoryStatistics& params) {
  const TensorView &features = params.features, &labels = params.labels;
  const bool weighted = element_count(params.directions) > 0;
  Problem p{};
  p.features = features;
  p.labels = labels;
  p.directions = weighted ? static_cast<const double*>(params.directions.data) : nullptr;
  p.scratch = params.scratch.data;
  p.part_sums = static_cast<double*>(params.part_sums.data);
  p.part_weights = static_cast<double*>(params.part_weights.data);
  p.part_counts = static_cast<int64_t*>(params.part_counts.data);
  p.outside = static_cast<int64_t*>(params.outside.data);
  p.parts = params.part_counts.size[0];
  p.classes = params.sums.size[0];
  p.channels = features.size[1];
  p.cells = features.size[0] * features.size[2] * features.size[3];
  p.ignore_index = params.ignore_index;
  p.down = make_resize_axis(features.size[2], labels.size[1], params.align_corners);
  p.across = make_resize_axis(features.size[3], labels.size[2], params.align_corners);
  return p;
}

// So many channels has a block that sums, a power of two.
int lanes_of_sums(const Problem& p) {
  int lanes = kSumThreads;
  while (lanes > kWarp &&
         (lanes / 2 >= p.channels || p.parts * divide_up(p.channels, lanes) < kBusyBlocks)) {
    lanes /= 2;
  }
  return lanes;
}

template <typename T>
const char* launch(const CategoryStatistics& params, cudaStream_t stream) {
  using A = Accumulator<T>;
  const Problem p = make_problem(params);
  const int64_t values = p.parts * p.classes * p.channels;
  const char* error = CTXOPS_LAUNCH(clear_kernel, grid_size(divide_up(values, 4 * kThreads)),
                                    kThreads, 0, stream, p);
  if (error == nullptr && p.directions != nullptr && p.cells > 0) {
    error = CTXOPS_LAUNCH((weights_kernel<T>), grid_size(divide_up(p.cells, kWarps)), kThreads, 0,
                          stream, p);
  }
  if (error == nullptr) {
    const int lanes = lanes_of_sums(p);
    error = CTXOPS_LAUNCH((sums_kernel<T>), grid_size(p.parts * divide_up(p.channels, lanes)),
                          kSumThreads, 0, stream, p, lanes);
  }
  if (error != nullptr) return error;
  return CTXOPS_LAUNCH((add_parts_kernel<A>),
                       grid_size(p.classes * divide_up(p.channels + 2, kWarp)), kThreads, 0, stream,
                       p, static_cast<A*>(params.sums.data), static_cast<A*>(params.weights.data),
                       static_cast<int64_t*>(params.counts.data));
}

}  // namespace

const char* category_statistics(const CategoryStatistics& params, Stream stream) {
  return dispatch(params, stream, [&](auto tag, cudaStream_t on) {
    return launch<typename decltype(tag)::type>(params, on);
  });
}

}  // namespace cuda
}  // namespace ctxops
