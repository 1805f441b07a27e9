// SPDX-License-Identifier: Apache-2.0
#include "category_statistics/category_statistics.h"
#include "common/parallel.h"
#include "common/simd.h"

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
  double* own;
  int64_t parts, classes, channels, height, width, ignore_index;
  int64_t columns;  // N, of a tile
  ResizeAxis down, across;
};

// to[c] += factor * from[c]
inline void add_scaled(double* __restrict to, const double* __restrict from, double factor,
                       int64_t count) {
  for (int64_t c = 0; c < count; ++c) to[c] += factor * from[c];
}

// The scalar product of kPairs pairs of vectors, each <a[i], b[i]>.
template <int kPairs>
CTXOPS_INLINE void products(const double* const* a, const double* const* b, double* to,
                            int64_t count) {
  constexpr int kRuns = kPairs > 2 ? 2 : 4;  // enough sums under way to hide the latency
  V sum[kPairs][kRuns] = {};
  int64_t c = 0;
  for (; c + kRuns * kLane <= count; c += kRuns * kLane) {
    for (int i = 0; i < kPairs; ++i) {
      for (int r = 0; r < kRuns; ++r) {
        sum[i][r] += load_vector(a[i] + c + r * kLane) * load_vector(b[i] + c + r * kLane);
      }
    }
  }
  for (; c < count; c += kLane) {
    const int64_t rest = smaller(kLane, count - c);
    for (int i = 0; i < kPairs; ++i) {
      sum[i][0] += load_vector(a[i] + c, rest) * load_vector(b[i] + c, rest);
    }
  }
  for (int i = 0; i < kPairs; ++i) {
    V total = sum[i][0];
    for (int r = 1; r < kRuns; ++r) total += sum[i][r];
    to[i] = reduce_lanes<1, double>(total, [](V x, V y) { return x + y; })[0];
  }
}

// A part walks down its rows of cells in tiles of N - 1 cells a row. Of a tile it keeps the two
// rows of positions that its cells lie between; a row goes to slot (number of the row) % 2.
class Part {
  struct Row {
    int64_t number;           // through all images; -1: none
    double* vector;           // (N, C): f
    double* product;          // (N, K): <f, m>, of the classes met
    double* share;            // (N, K): the coefficient of f in the class's sum, of the classes met
    int32_t* is_met;          // (N, K): has the class a pixel in a cell around?
    int32_t* met;             // (N, K): those classes
    int64_t* met_count;       // (N,)
    double *square, *beside;  // (N,): |f|^2, and <f, f'> with the next in the row
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
    double* next = p_.own + part * N * (2 * C_ + 6 * K_ + 11);
    const auto take = [&](int64_t each) {
      double* taken = next;
      next += N * each;
      return taken;
    };
    for (Row& row : row_) {
      row.vector = take(C_);
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
      for (Row& row : row_) row.number = -1;
      for (int64_t number = rows_.begin; number < rows_.end; ++number) row_of_cells(number);
      for (Row& row : row_) finish(row);
    }
  }

  // How many labels are neither a class nor ignored, and the first of them.
  const int64_t* outside() const { return outside_; }

 private:
  void row_of_cells(int64_t number) {
    const int64_t image = number / p_.height, y = number % p_.height;
    const int64_t begin = first_target(p_.down, y), end = first_target(p_.down, y + 1);
    if (begin == end || begin_[0] == begin_[cells_]) return;
    const Row& upper = fetch(number);
    const Row& lower = fetch(y + 1 < p_.height ? number + 1 : number);
    if (p_.directions != nullptr) measure_between(upper, lower);
    for (int64_t Y = begin; Y < end; ++Y) row_of_pixels(image, Y, upper, lower);
  }

  Row& fetch(int64_t number) {
    Row& row = row_[number % 2];
    if (row.number == number) return row;
    finish(row);
    row.number = number;
    dispatch_floating(p_.features.dtype, [&](auto tag) {
      load_row<typename decltype(tag)::type>(number / p_.height, number % p_.height, row.vector);
    });
    if (p_.directions == nullptr) return row;
    for (int64_t i = 0; i < positions_; ++i) {
      const double* f = row.vector + i * C_;
      const double* next = row.vector + smaller(i + 1, positions_ - 1) * C_;
      const double *a[] = {f, f}, *b[] = {f, next};
      double product[2];
      products<2>(a, b, product, C_);
      row.square[i] = product[0];
      row.beside[i] = product[1];
    }
    return row;
  }

  template <typename T>
  void load_row(int64_t b, int64_t y, double* to) const {
    const int64_t* stride = p_.features.stride;
    const T* from = static_cast<const T*>(p_.features.data) + b * stride[0] + y * stride[2] +
                    first_ * stride[3];
    if (unit_stride(p_.features, 1)) {
      for (int64_t i = 0; i < positions_; ++i) {
        for (int64_t c = 0; c < C_; ++c) to[i * C_ + c] = load(from[i * stride[3] + c]);
      }
      return;
    }
    // A cache line of the target at a time.
    int64_t c = 0;
    for (; c + 8 <= C_; c += 8) {
      for (int64_t i = 0; i < positions_; ++i) {
        for (int64_t j = 0; j < 8; ++j) {
          to[i * C_ + c + j] = load(from[(c + j) * stride[1] + i]);
        }
      }
    }
    for (; c < C_; ++c) {
      for (int64_t i = 0; i < positions_; ++i) to[i * C_ + c] = load(from[c * stride[1] + i]);
    }
  }

  void measure_between(const Row& upper, const Row& lower) {
    for (int64_t i = 0; i < positions_; ++i) {
      const int64_t right = smaller(i + 1, positions_ - 1);
      const double *f = upper.vector + i * C_, *f_right = upper.vector + right * C_;
      const double *g = lower.vector + i * C_, *g_right = lower.vector + right * C_;
      const double *a[] = {f, f, f_right}, *b[] = {g, g_right, g};
      double product[3];
      products<3>(a, b, product, C_);
      below_[i] = product[0];
      diagonal_[i] = product[1];
      anti_[i] = product[2];
    }
  }

  // The pixels of row Y of the labels that lie in the tile.
  void row_of_pixels(int64_t image, int64_t Y, const Row& upper, const Row& lower) {
    const double v = tap_at(p_.down, Y).weight;
    const int64_t row = image * p_.labels.stride[0] + Y * p_.labels.stride[1];
    const auto label = [&](int64_t X) CTXOPS_INLINE_LAMBDA {
      return load_label(p_.labels.data, p_.labels.dtype, row + X * p_.labels.stride[2]);
    };
    for (int64_t i = 0; i < cells_; ++i) {
      const int64_t right = smaller(i + 1, positions_ - 1);
      // |r|^2 is a quadratic form of the shares along the row, its coefficients are squares and the
      // product of l and r, the points between upper and lower row on the cell's left and right.
      double ll = 0, lr = 0, rr = 0;
      if (p_.directions != nullptr) {
        const double uu = (1 - v) * (1 - v), ul = v * (1 - v), vv = v * v;
        ll = uu * upper.square[i] + 2 * ul * below_[i] + vv * lower.square[i];
        rr = uu * upper.square[right] + 2 * ul * below_[right] + vv * lower.square[right];
        lr = uu * upper.beside[i] + ul * (diagonal_[i] + anti_[i]) + vv * lower.beside[i];
      }
      int64_t X = begin_[i];
      while (X < begin_[i + 1]) {
        const int64_t k = label(X);
        if (k == p_.ignore_index) {
          ++X;
          continue;
        }
        if (k < 0 || k >= K_) {
          if (outside_[0]++ == 0) outside_[1] = k;
          ++X;
          continue;
        }
        const int64_t run = X;
        if (counts_[k] == 0) clear(sums_ + k * C_);
        double left_share = 0, right_share = 0;
        meet(upper, i, k), meet(upper, right, k), meet(lower, i, k), meet(lower, right, k);
        if (p_.directions == nullptr) {
          for (; X < begin_[i + 1] && label(X) == k; ++X) {
            const double u = tap_at(p_.across, X).weight;
            left_share += 1 - u;
            right_share += u;
          }
        } else {
          const double l = (1 - v) * upper.product[i * K_ + k] + v * lower.product[i * K_ + k];
          const double r =
              (1 - v) * upper.product[right * K_ + k] + v * lower.product[right * K_ + k];
          for (; X < begin_[i + 1] && label(X) == k; ++X) {
            const double u = tap_at(p_.across, X).weight;
            const double square = (1 - u) * (1 - u) * ll + 2 * u * (1 - u) * lr + u * u * rr;
            // Of an inexact square; written so that NaN stays.
            double norm = __builtin_sqrt(square < 0 ? 0 : square);
            norm = norm < kShortest ? kShortest : norm;
            const double weight = 1 - ((1 - u) * l + u * r) / norm;
            left_share += weight * (1 - u);
            right_share += weight * u;
          }
        }
        upper.share[i * K_ + k] += (1 - v) * left_share;
        lower.share[i * K_ + k] += v * left_share;
        upper.share[right * K_ + k] += (1 - v) * right_share;
        lower.share[right * K_ + k] += v * right_share;
        weights_[k] += left_share + right_share;
        counts_[k] += X - run;
      }
    }
  }

  void clear(double* sum) const {
    for (int64_t c = 0; c < C_; ++c) sum[c] = 0;
  }

  // Class k has a pixel beside position i of the row.
  void meet(const Row& row, int64_t i, int64_t k) {
    if (row.is_met[i * K_ + k]) return;
    row.is_met[i * K_ + k] = 1;
    row.met[i * K_ + row.met_count[i]++] = static_cast<int32_t>(k);
    row.share[i * K_ + k] = 0;
    if (p_.directions == nullptr) return;
    const double *f = row.vector + i * C_, *m = p_.directions + k * C_;
    products<1>(&f, &m, row.product + i * K_ + k, C_);
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
  double *below_, *diagonal_, *anti_;  // (N,): <f, f'> with the one below, and across a cell
  int64_t* begin_;                     // (N,): the first pixel of a cell in its row
  int64_t* outside_;                   // (2,)
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
      add_scaled(sum, own, 1, C);
    }
    weight += p.part_weights[entry];
    count += p.part_counts[entry];
  }
  for (int64_t c = 0; c < C; ++c) sums[k * C + c] = sum == nullptr ? 0 : static_cast<A>(sum[c]);
  weights[k] = static_cast<A>(weight);
  counts[k] = count;
}

}  // namespace

const char* category_statistics(const TensorView& features, const TensorView& labels,
                                const TensorView& directions, const TensorView& sums,
                                const TensorView& weights, const TensorView& counts,
                                const TensorView& outside, const TensorView& part_sums,
                                const TensorView& part_weights, const TensorView& part_counts,
                                const TensorView& own, int64_t ignore_index, bool align_corners,
                                int64_t threads) {
  if (const char* error = check(features, labels, directions, sums, weights, counts, outside,
                                part_sums, part_weights, part_counts)) {
    return error;
  }
  if (!unit_stride(features, 1) && !unit_stride(features, 3)) {
    return "features must have their channels or their columns side by side";
  }
  Problem p;
  p.features = features;
  p.labels = labels;
  const bool directed = element_count(directions) > 0;
  p.directions = directed ? static_cast<const double*>(directions.data) : nullptr;
  p.part_sums = static_cast<double*>(part_sums.data);
  p.part_weights = static_cast<double*>(part_weights.data);
  p.part_counts = static_cast<int64_t*>(part_counts.data);
  p.own = static_cast<double*>(own.data);
  p.parts = part_counts.size[0];
  p.classes = sums.size[0];
  p.channels = features.size[1];
  p.height = features.size[2];
  p.width = features.size[3];
  p.ignore_index = ignore_index;
  p.columns = own.ndim == 3 ? own.size[1] : 0;
  p.down = make_resize_axis(p.height, labels.size[1], align_corners);
  p.across = make_resize_axis(p.width, labels.size[2], align_corners);
  if (p.columns < 2 || !is_dense(own, features, DType::float64, p.parts, p.columns,
                                 2 * p.channels + 6 * p.classes + 11)) {
    return "own must be (P, N, 2 * C + 6 * K + 11) in double, N >= 2";
  }
  int64_t* found = static_cast<int64_t*>(outside.data);
  found[0] = found[1] = 0;
  parallel_for(p.parts, element_count(features), threads,
               [&](int64_t part) { Part(p, part).run(); });
  for (int64_t part = 0; part < p.parts; ++part) {
    const int64_t* of_part = Part(p, part).outside();
    if (found[0] == 0) found[1] = of_part[1];
    found[0] += of_part[0];
  }
  parallel_for(p.classes, p.parts * p.classes * p.channels, threads, [&](int64_t k) {
    dispatch_floating(accumulator_dtype(features.dtype), [&](auto tag) {
      using A = typename decltype(tag)::type;
      if constexpr (std::is_floating_point_v<A>) {
        add_parts(p, k, static_cast<A*>(sums.data), static_cast<A*>(weights.data),
                  static_cast<int64_t*>(counts.data));
      }
    });
  });
  return nullptr;
}

}  // namespace CTXOPS_ISA
}  // namespace ctxops
