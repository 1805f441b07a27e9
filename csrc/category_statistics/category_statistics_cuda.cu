// SPDX-License-Identifier: Apache-2.0
//
// A warp takes a cell and one of the classes among its pixels at a time, in ascending order: its
// lanes share the channels, or the pixels. With directions, a first kernel writes a of every pixel.
// Then a block takes a part of the cells: its warps turn them into terms, each a class and the
// coefficients of the four corners, and its threads, each with a channel of its own, add the terms.
// A class's sum in a part belongs to one thread: the order of the additions is always the same.
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
constexpr int kBlocks = 3;          // on a multiprocessor at a time
constexpr int kTerms = 8 * kWarps;  // that a block makes and adds between two barriers
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
  int64_t at;                 // its upper left corner in the features
  bool has_right, has_below;  // are there corners on the right, and below?
  int b, top, left;           // of its pixels
  int rows, columns;          // likewise, perhaps none

  __device__ Corners corners(const Problem& p) const {
    return {at, has_right ? p.features.stride[3] : 0, has_below ? p.features.stride[2] : 0};
  }
};

// A warp calls it.
__device__ Cell cell_at(const Problem& p, int64_t number) {
  const int64_t h = p.features.size[2], w = p.features.size[3];
  const int64_t x = number % w, y = number / w % h, b = number / w / h;
  // Four lanes look for a side each.
  const int lane = lane_of_thread();
  const ResizeAxis axis = lane % 4 < 2 ? p.down : p.across;
  const int side = static_cast<int>(first_target(axis, (lane % 4 < 2 ? y : x) + lane % 2));
  const int top = __shfl_sync(kAllLanes, side, 0), bottom = __shfl_sync(kAllLanes, side, 1);
  const int left = __shfl_sync(kAllLanes, side, 2), right = __shfl_sync(kAllLanes, side, 3);
  const int64_t* const stride = p.features.stride;
  return {b * stride[0] + y * stride[2] + x * stride[3],
          x + 1 < w && step_of(p.across) > 0,
          y + 1 < h && step_of(p.down) > 0,
          static_cast<int>(b),
          top,
          left,
          bottom - top,
          right - left};
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
  if (cell.rows == 0 || cell.columns == 0) return;
  const int64_t* const stride = p.labels.stride;
  const int64_t count = static_cast<int64_t>(cell.rows) * cell.columns;
  Walk walk(lane_of_thread(), kWarp, cell.columns);
  for (int64_t i = lane_of_thread(); i < count; i += kWarp, walk.next()) {
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

// The shares of a cell's corners in one of its pixels.
struct Shares {
  double of[4];
};

__device__ Shares shares_at(const Problem& p, int64_t Y, int64_t X) {
  const double v = tap_at(p.down, Y).weight, u = tap_at(p.across, X).weight;
  return {{(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u}};
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
    double product[10] = {};  // <f, f'>, the corners' with themselves and those in front
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
        for (int i = 0, n = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j <= i; ++j, ++n) product[n] += f[i] * f[j];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) along[i] = warp_sum(along[i]);
#pragma unroll
      for (int n = 0; n < 10 && !measured; ++n) product[n] = warp_sum(product[n]);
      measured = true;

      k = for_pixels_of(p, cell, k, [&](int64_t Y, int64_t X) {
        const Shares share = shares_at(p, Y, X);
        double dot = 0, square = 0;
#pragma unroll
        for (int i = 0, n = 0; i < 4; ++i) {
          dot += share.of[i] * along[i];
#pragma unroll
          for (int j = 0; j <= i; ++j, ++n) {
            square += (i == j ? 1 : 2) * share.of[i] * share.of[j] * product[n];
          }
        }
        // Of an inexact square; written so that NaN stays.
        double norm = sqrt(square < 0 ? 0 : square);
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

// The terms of every kWarps-th cell of a range. A warp has one.
template <typename A>
class Terms {
 public:
  __device__ Terms(const Problem& p, Span cells, bool counts_outside)
      : p_(p),
        number_(cells.begin + warp_of_thread()),
        end_(cells.end),
        counts_outside_(counts_outside) {}

  __device__ Term next() {
    while (k_ == kNone && number_ < end_) {
      cell_ = cell_at(p_, number_);
      number_ += kWarps;
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
      const Shares share = shares_at(p_, Y, X);
#pragma unroll
      for (int i = 0; i < 4; ++i) term.coefficient[i] += a * share.of[i];
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

// The sums of a part. A block has the channels that its threads can take at once.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sums_kernel(const __grid_constant__ Problem p) {
  CTXOPS_SHARED(Term, terms, kTerms);
  const T* const features = static_cast<const T*>(p.features.data);
  const int64_t C = p.channels, K = p.classes, tiles = divide_up(C, kThreads);
  for (int64_t item = blockIdx.x; item < p.parts * tiles; item += gridDim.x) {
    const int part = static_cast<int>(item / tiles);
    const int64_t tile = item % tiles, c = tile * kThreads + threadIdx.x;
    const Span cells = span_of_part(part, p.parts, p.cells);
    Terms<Accumulator<T>> own(p, cells, tile == 0);
    for (bool more = true; more;) {
      for (int i = warp_of_thread(); i < kTerms; i += kWarps) {
        const Term term = own.next();
        if (lane_of_thread() == 0) terms[i] = term;
      }
      __syncthreads();

      double sum = 0;
      int32_t k = kNone;  // whose sum
      for (int first = 0; c < C && first < kTerms; first += kAtOnce<T>) {
        T f[kAtOnce<T>][4];
#pragma unroll
        for (int n = 0; n < kAtOnce<T>; ++n) {
          const Term& term = terms[first + n];
          if (term.k == kNone) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) f[n][i] = features[term.corners.offset(i) + c];
        }
#pragma unroll
        for (int n = 0; n < kAtOnce<T>; ++n) {
          const Term& term = terms[first + n];
          if (term.k == kNone) continue;
          if (term.k != k) {
            if (k != kNone) p.part_sums[(part * K + k) * C + c] += sum;
            k = term.k;
            sum = 0;
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) sum += term.coefficient[i] * load(f[n][i]);
        }
      }
      if (k != kNone) p.part_sums[(part * K + k) * C + c] += sum;

      // The shares of a pixel add up to 1.
      for (int64_t j = threadIdx.x; tile == 0 && j < K; j += kThreads) {
        double weight = 0;
        int64_t count = 0;
        for (int i = 0; i < kTerms; ++i) {
          const Term& term = terms[i];
          if (term.k != j) continue;
          for (const double coefficient : term.coefficient) weight += coefficient;
          count += term.count;
        }
        p.part_weights[part * K + j] += weight;
        p.part_counts[part * K + j] += count;
      }
      more = false;  // a warp that has more has filled the last of its places
      for (int i = kTerms - kWarps; i < kTerms; ++i) more = more || terms[i].k != kNone;
      __syncthreads();
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

const char* check_for_cuda(const CategoryStatistics& params) {
  const TensorView &features = params.features, &labels = params.labels;
  if (!unit_stride(features, 1)) return "features must have their channels side by side";
  for (int i = 0; i < 3; ++i) {
    if (labels.size[i] > INT32_MAX) return "labels must have B, H, W below 2^31";
  }
  if (element_count(params.directions) > 0 &&
      !is_dense(params.scratch, features, accumulator_dtype(features.dtype), labels.size[0],
                labels.size[1], labels.size[2])) {
    return "scratch must be (B, H, W), an accumulator";
  }
  return nullptr;
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

template <typename T>
const char* launch(const CategoryStatistics& params, cudaStream_t stream) {
  using A = Accumulator<T>;
  if (const char* error = check_for_cuda(params)) return error;
  const Problem p = make_problem(params);
  const int64_t values = p.parts * p.classes * p.channels;
  const char* error = CTXOPS_LAUNCH(clear_kernel, grid_size(divide_up(values, 4 * kThreads)),
                                    kThreads, 0, stream, p);
  if (error == nullptr && p.directions != nullptr && p.cells > 0) {
    error = CTXOPS_LAUNCH((weights_kernel<T>), grid_size(divide_up(p.cells, kWarps)), kThreads, 0,
                          stream, p);
  }
  if (error == nullptr) {
    error = CTXOPS_LAUNCH((sums_kernel<T>), grid_size(p.parts * divide_up(p.channels, kThreads)),
                          kThreads, 0, stream, p);
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
