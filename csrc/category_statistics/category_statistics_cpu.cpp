// SPDX-License-Identifier: Apache-2.0
#include "category_statistics/category_statistics.h"
#include "common/parallel.h"
#include "common/transpose.h"

namespace ctxops {
namespace CTXOPS_ISA {
namespace {

using V = Vector<double>;
constexpr int kLane = kLanes<double>;

struct Problem {
  TensorView features, labels;
  const double* directions;  // (K, C), or nullptr: every pixel weighs 1
  double *part_sums, *part_weights;
  int64_t* part_counts;
  double* scratch;
  int64_t parts, classes, channels, height, width, ignore_index;
  int64_t columns, scratch_each;  // N, and the values that a part has for each of them
  ResizeAxis down, across;
};

CTXOPS_INLINE V widen(const double* from) { return load_vector(from); }

CTXOPS_INLINE V widen(const float* from) {
  typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));
  Narrow v;
  memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, V);
}

template <typename S>
CTXOPS_INLINE V widen(const S* from, int64_t count) {
  V v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

// to[c] += factor * from[c]
template <typename S>
void add_scaled(double* __restrict to, const S* __restrict from, double factor, int64_t count) {
  int64_t c = 0;
  for (; c + kLane <= count; c += kLane) {
    store_vector<double>(to + c, load_vector(to + c) + factor * widen(from + c));
  }
  for (; c < count; ++c) to[c] += factor * from[c];
}

// Calls f(at), and at(pointer) is the vector there of the next kLane channels, of the rest 0, for
// all channels. f is called for two vectors in turn, with run 0 and 1: enough sums to hide latency.
template <typename F>
CTXOPS_INLINE void for_channels(int64_t count, const F& f) {
  int64_t c = 0;
  for (; c + 2 * kLane <= count; c += 2 * kLane) {
    f(0, [&](const auto* from) CTXOPS_INLINE_LAMBDA { return widen(from + c); });
    f(1, [&](const auto* from) CTXOPS_INLINE_LAMBDA { return widen(from + c + kLane); });
  }
  for (; c < count; c += kLane) {
    const int64_t rest = smaller(kLane, count - c);
    f(0, [&](const auto* from) CTXOPS_INLINE_LAMBDA { return widen(from + c, rest); });
  }
}

CTXOPS_INLINE double sum_of(const V* runs) {
  return reduce_lanes<1, double>(runs[0] + runs[1], [](V x, V y) { return x + y; })[0];
}

// A part walks down its rows of cells in tiles of N - 1 cells a row. Of a tile it keeps the two
// rows of positions that its cells lie between; a row goes to slot (number of the row) % 2. It does
// not know the features' type, only S, in which their vectors are kept.
template <typename S>
class Part {
  struct Row {
    int64_t number;      // through all images; -1: none
    S* vector;           // (N, C): f
    double* product;     // (N, K): <f, m>, of the classes met
    double* share;       // (N, K): the coefficient of f in the class's sum, of the classes met
    int32_t* is_met;     // (N, K): has the class a pixel in a cell around?
    int32_t* met;        // (N, K): those classes
    int64_t* met_count;  // (N,)
    double* square;      // (N,): |f|^2
    double* beside;      // (N,): <f, f'> with the one on the right
  };

 public:
  Part(const Problem& problem, int64_t part)
      : p_(problem),
        C_(problem.channels),
        K_(problem.classes),
        rows_(span_of_part(part, problem.parts, problem.features.size[0] * problem.height)),
        sums_(problem.part_sums + part * K_ * C_),
        weights_(problem.part_weights + part * K_),
        counts_(problem.part_counts + part * K_) {
    const int64_t N = p_.columns;
    double* next = p_.scratch + part * N * p_.scratch_each;
    const auto take = [&](int64_t each) {
      double* taken = next;
      next += N * each;
      return taken;
    };
    for (Row& row : row_) {
      row.vector = reinterpret_cast<S*>(take(doubles_of_vector(std::is_same_v<S, double>, C_)));
      row.product = take(K_);
      row.share = take(K_);
      row.is_met = reinterpret_cast<int32_t*>(take(K_));
      row.met = row.is_met + N * K_;
      row.met_count = reinterpret_cast<int64_t*>(take(1));
      row.square = take(1);
      row.beside = take(1);
    }
    below_ = take(1);
    diagonal_ = take(1);
    anti_ = take(1);
    begin_ = reinterpret_cast<int64_t*>(take(1));
    outside_ = reinterpret_cast<int64_t*>(take(1));
    const int64_t pixels = pixels_each(p_.labels.size[2], N);
    right_share_ = take(pixels);
    inverse_norm_ = take(pixels);
  }

  void run() {
    for (int64_t k = 0; k < K_; ++k) {
      weights_[k] = 0;
      counts_[k] = 0;
    }
    for (Row& row : row_) {
      for (int64_t i = 0; i < p_.columns * K_; ++i) row.is_met[i] = 0;
      for (int64_t i = 0; i < p_.columns; ++i) row.met_count[i] = 0;
    }
    outside_[0] = outside_[1] = 0;
    const int64_t step = p_.columns - 1;
    for (first_ = 0; first_ < p_.width; first_ += step) {
      cells_ = smaller(step, p_.width - first_);
      positions_ = smaller(cells_ + 1, p_.width - first_);
      for (int64_t i = 0; i <= cells_; ++i) begin_[i] = first_target(p_.across, first_ + i);
      for (int64_t i = 0; i < cells_; ++i) {
        for (int64_t X = begin_[i]; X < begin_[i + 1]; ++X) {
          right_share_[X - begin_[0]] = tap_at(p_.across, X).weight;
        }
      }
      for (Row& row : row_) row.number = -1;
      for (int64_t number = rows_.begin; number < rows_.end; ++number) row_of_cells(number);
      for (Row& row : row_) finish(row);
    }
  }

  // How many labels are neither a class nor ignored, and the first of them.
  const int64_t* outside() const { return outside_; }

 private:
  int64_t right_of(int64_t i) const { return smaller(i + step_of(p_.across), positions_ - 1); }

  void row_of_cells(int64_t number) {
    const int64_t image = number / p_.height, y = number % p_.height;
    const int64_t begin = first_target(p_.down, y), end = first_target(p_.down, y + 1);
    if (begin == end || begin_[0] == begin_[cells_]) return;
    Row& upper = row_[number % 2];
    if (upper.number != number) {
      load_row(upper, number);
      if (p_.directions != nullptr) measure<false>(upper, upper);
    }
    const int64_t below = smaller(y + step_of(p_.down), p_.height - 1) - y;
    Row& lower = row_[(number + below) % 2];
    if (below > 0) load_row(lower, number + below);
    if (p_.directions != nullptr) measure<true>(upper, lower);
    dispatch_integer(p_.labels.dtype, [&](auto tag) {
      using L = typename decltype(tag)::type;
      for (int64_t Y = begin; Y < end; ++Y) row_of_pixels<L>(image, Y, upper, lower);
    });
  }

  void load_row(Row& row, int64_t number) {
    finish(row);
    row.number = number;
    dispatch_floating(p_.features.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (std::is_same_v<Accumulator<T>, S>) load_vectors<T>(row.vector, number);
    });
  }

  template <typename T>
  void load_vectors(S* to, int64_t number) const {
    const int64_t b = number / p_.height, y = number % p_.height;
    const int64_t* stride = p_.features.stride;
    const T* from = static_cast<const T*>(p_.features.data) + b * stride[0] + y * stride[2] +
                    first_ * stride[3];
    if (unit_stride(p_.features, 1)) {
      for (int64_t i = 0; i < positions_; ++i) {
        for (int64_t c = 0; c < C_; ++c) to[i * C_ + c] = load(from[i * stride[3] + c]);
      }
      return;
    }
    int64_t c = 0;
    if constexpr (std::is_same_v<T, S>) {
      for (; c + kLanes<S> <= C_; c += kLanes<S>) {
        turn_strip(from + c * stride[1], stride[1], to + c, C_, positions_);
      }
    }
    // Through blocks in which neither side's strides, often powers of two, fight for a cache set.
    constexpr int64_t kSide = 16;
    S block[kSide][kSide];
    for (; c < C_; c += kSide) {
      const int64_t channels = smaller(kSide, C_ - c);
      for (int64_t i = 0; i < positions_; i += kSide) {
        const int64_t positions = smaller(kSide, positions_ - i);
        for (int64_t j = 0; j < channels; ++j) {
          const T* line = from + (c + j) * stride[1] + i;
          for (int64_t n = 0; n < positions; ++n) block[n][j] = load(line[n]);
        }
        for (int64_t n = 0; n < positions; ++n) {
          for (int64_t j = 0; j < channels; ++j) to[(i + n) * C_ + c + j] = block[n][j];
        }
      }
    }
  }

  // The products of the lower row, and between the two; or of one row alone.
  template <bool kBoth>
  void measure(const Row& upper, const Row& lower) {
    for (int64_t i = 0; i < positions_; ++i) {
      const int64_t right = right_of(i);
      const S *f = upper.vector + i * C_, *f_right = upper.vector + right * C_;
      const S *g = lower.vector + i * C_, *g_right = lower.vector + right * C_;
      V square[2] = {}, beside[2] = {}, below[2] = {}, diagonal[2] = {}, anti[2] = {};
      for_channels(C_, [&](int run, const auto& at) CTXOPS_INLINE_LAMBDA {
        const V low = at(g), low_right = at(g_right);
        square[run] += low * low;
        beside[run] += low * low_right;
        if constexpr (kBoth) {
          const V up = at(f), up_right = at(f_right);
          below[run] += up * low;
          diagonal[run] += up * low_right;
          anti[run] += up_right * low;
        }
      });
      lower.square[i] = sum_of(square);
      lower.beside[i] = sum_of(beside);
      if constexpr (kBoth) {
        below_[i] = sum_of(below);
        diagonal_[i] = sum_of(diagonal);
        anti_[i] = sum_of(anti);
      }
    }
  }

  // The pixels of row Y of the labels that lie in the tile.
  template <typename L>
  void row_of_pixels(int64_t image, int64_t Y, const Row& upper, const Row& lower) {
    const double v = tap_at(p_.down, Y).weight;
    const int64_t stride = p_.labels.stride[2], pixels = begin_[cells_] - begin_[0];
    const L* label = static_cast<const L*>(p_.labels.data) + image * p_.labels.stride[0] +
                     Y * p_.labels.stride[1] + begin_[0] * stride;
    if (p_.directions != nullptr) find_norms(v, upper, lower);
    for (int64_t i = 0, X = 0; X < pixels; ++i) {
      const int64_t right = right_of(i), end = begin_[i + 1] - begin_[0];
      while (X < end) {
        const int64_t k = label[X * stride];
        if (k == p_.ignore_index || k < 0 || k >= K_) {
          if (k != p_.ignore_index && outside_[0]++ == 0) outside_[1] = k;
          ++X;
          continue;
        }
        meet(upper, i, k), meet(upper, right, k), meet(lower, i, k), meet(lower, right, k);
        const int64_t run = X;
        double weight = 0, right_weight = 0;
        if (p_.directions == nullptr) {
          for (; X < end && label[X * stride] == k; ++X) right_weight += right_share_[X];
          weight = static_cast<double>(X - run);
        } else {
          const int64_t here = i * K_ + k, there = right * K_ + k;
          const double left_product = (1 - v) * upper.product[here] + v * lower.product[here];
          const double right_product = (1 - v) * upper.product[there] + v * lower.product[there];
          for (; X < end && label[X * stride] == k; ++X) {
            const double u = right_share_[X];
            const double product = (1 - u) * left_product + u * right_product;
            const double a = weight_of(product * inverse_norm_[X]);
            weight += a;
            right_weight += a * u;
          }
        }
        if (counts_[k] == 0) clear(sums_ + k * C_);
        counts_[k] += X - run;
        weights_[k] += weight;
        const double left_weight = weight - right_weight;
        upper.share[i * K_ + k] += (1 - v) * left_weight;
        lower.share[i * K_ + k] += v * left_weight;
        upper.share[right * K_ + k] += (1 - v) * right_weight;
        lower.share[right * K_ + k] += v * right_weight;
      }
    }
  }

  // 1 / max(|r|, eps) for a row of pixels. Between two points l and r of a cell's left and right
  // edge |.|^2 is quadratic; its coefficients are the products of l and r.
  void find_norms(double v, const Row& upper, const Row& lower) {
    const double uu = (1 - v) * (1 - v), ul = v * (1 - v), vv = v * v;
    for (int64_t i = 0; i < cells_; ++i) {
      const int64_t right = right_of(i);
      const double ll = uu * upper.square[i] + 2 * ul * below_[i] + vv * lower.square[i];
      const double rr =
          uu * upper.square[right] + 2 * ul * below_[right] + vv * lower.square[right];
      const double lr =
          uu * upper.beside[i] + ul * (diagonal_[i] + anti_[i]) + vv * lower.beside[i];
      const double linear = 2 * (lr - ll), quadratic = ll - 2 * lr + rr;
      for (int64_t X = begin_[i] - begin_[0]; X < begin_[i + 1] - begin_[0]; ++X) {
        const double u = right_share_[X];
        double square = ll + u * (linear + u * quadratic);
        // Written so that NaN stays; an inexact square may be negative.
        square = square < kShortest * kShortest ? kShortest * kShortest : square;
        inverse_norm_[X] = 1 / __builtin_sqrt(square);
      }
    }
  }

  void clear(double* sum) const {
    for (int64_t c = 0; c < C_; ++c) sum[c] = 0;
  }

  // Class k has a pixel beside position i of the row.
  CTXOPS_INLINE void meet(const Row& row, int64_t i, int64_t k) {
    if (!row.is_met[i * K_ + k]) meet_first(row, i, k);
  }

  __attribute__((noinline)) void meet_first(const Row& row, int64_t i, int64_t k) {
    row.is_met[i * K_ + k] = 1;
    row.met[i * K_ + row.met_count[i]++] = static_cast<int32_t>(k);
    row.share[i * K_ + k] = 0;
    if (p_.directions == nullptr) return;
    const S* f = row.vector + i * C_;
    const double* m = p_.directions + k * C_;
    V product[2] = {};
    for_channels(
        C_, [&](int run, const auto& at) CTXOPS_INLINE_LAMBDA { product[run] += at(f) * at(m); });
    row.product[i * K_ + k] = sum_of(product);
  }

  // Adds the row's vectors to the sums of the classes around them, and forgets it.
  void finish(Row& row) {
    if (row.number < 0) return;
    for (int64_t i = 0; i < positions_; ++i) {
      for (int64_t n = 0; n < row.met_count[i]; ++n) {
        const int64_t k = row.met[i * K_ + n];
        add_scaled(sums_ + k * C_, row.vector + i * C_, row.share[i * K_ + k], C_);
        row.is_met[i * K_ + k] = 0;
      }
      row.met_count[i] = 0;
    }
    row.number = -1;
  }

  const Problem& p_;
  const int64_t C_, K_;
  const Span rows_;
  double *sums_, *weights_;            // (K, C), (K,)
  int64_t* counts_;                    // (K,)
  int64_t first_, cells_, positions_;  // of the tile: first cell of a row, cells, positions
  Row row_[2];
  double *below_, *diagonal_, *anti_;    // (N,): <f, f'> with the one below, and across a cell
  int64_t* begin_;                       // (N,): the first pixel of a cell in its row
  int64_t* outside_;                     // (2,)
  double *right_share_, *inverse_norm_;  // of the tile's pixels in a row: u, 1 / max(|r|, eps)
};

// The sum of class k over the parts, in their order.
template <typename A>
void add_parts(const Problem& p, int64_t k, A* sums, A* weights, int64_t* counts) {
  const int64_t C = p.channels, K = p.classes;
  double *sum = nullptr, weight = 0;
  int64_t count = 0;
  for (int64_t part = 0; part < p.parts; ++part) {
    const int64_t entry = part * K + k;
    if (p.part_counts[entry] == 0) continue;
    double* own = p.part_sums + entry * C;
    if (sum == nullptr) {
      sum = own;
    } else {
      add_scaled(sum, own, 1.0, C);
    }
    weight += p.part_weights[entry];
    count += p.part_counts[entry];
  }
  for (int64_t c = 0; c < C; ++c) sums[k * C + c] = sum == nullptr ? 0 : static_cast<A>(sum[c]);
  weights[k] = static_cast<A>(weight);
  counts[k] = count;
}

template <typename A>
void statistics(const CategoryStatistics& params, Threads threads) {
  const TensorView &features = params.features, &labels = params.labels;
  const TensorView& scratch = params.scratch;
  Problem p;
  p.features = features;
  p.labels = labels;
  const bool directed = element_count(params.directions) > 0;
  p.directions = directed ? static_cast<const double*>(params.directions.data) : nullptr;
  p.part_sums = static_cast<double*>(params.part_sums.data);
  p.part_weights = static_cast<double*>(params.part_weights.data);
  p.part_counts = static_cast<int64_t*>(params.part_counts.data);
  p.scratch = static_cast<double*>(scratch.data);
  p.parts = params.part_counts.size[0];
  p.classes = params.sums.size[0];
  p.channels = features.size[1];
  p.height = features.size[2];
  p.width = features.size[3];
  p.ignore_index = params.ignore_index;
  p.columns = scratch.size[1];
  p.scratch_each = scratch.size[2];
  p.down = make_resize_axis(p.height, labels.size[1], params.align_corners);
  p.across = make_resize_axis(p.width, labels.size[2], params.align_corners);
  int64_t* found = static_cast<int64_t*>(params.outside.data);
  found[0] = found[1] = 0;
  parallel_for(p.parts, element_count(features), threads,
               [&](int64_t part) { Part<A>(p, part).run(); });
  for (int64_t part = 0; part < p.parts; ++part) {
    const int64_t* of_part = Part<A>(p, part).outside();
    if (found[0] == 0) found[1] = of_part[1];
    found[0] += of_part[0];
  }
  parallel_for(p.classes, p.parts * p.classes * p.channels, threads, [&](int64_t k) {
    add_parts(p, k, static_cast<A*>(params.sums.data), static_cast<A*>(params.weights.data),
              static_cast<int64_t*>(params.counts.data));
  });
}

}  // namespace

const char* category_statistics(const CategoryStatistics& params, Threads threads) {
  return dispatch(params, [&](auto tag) -> const char* {
    statistics<Accumulator<typename decltype(tag)::type>>(params, threads);
    return nullptr;
  });
}

}  // namespace CTXOPS_ISA
}  // namespace ctxops
