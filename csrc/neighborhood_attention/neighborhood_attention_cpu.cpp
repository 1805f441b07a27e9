// SPDX-License-Identifier: Apache-2.0
// Vectors run along the channels. A few neighbouring queries of one residue class are computed
// together, for they share most of their keys: wherever their windows stand side by side inside the
// map. All others go one by one.
#include "common/parallel.h"
#include "common/simd.h"
#include "neighborhood_attention/neighborhood_attention.h"

namespace ctxops {
namespace CTXOPS_ISA {
namespace {

// What stays in registers: kQueries x kColumns sums of products, or kQueries x kUnroll vectors of
// output. So many rows of queries, of one class, go together: what they see stays in the innermost
// cache.
constexpr int kQueries = kVectorRegisters == 32 ? 4 : 2;
constexpr int kColumns = 5;
constexpr int kUnroll = 4;
constexpr int kRows = 4;

// Queries of a class are visited in tiles, whose windows' keys and values stay in the next cache.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1 << 19;

// A block keeps at most so many weights: those of kQueries windows, or, where windows slide inside
// the map, of the queries that see a key, fewer than twice a window's length along each axis.
constexpr int64_t kMaxWeights = 2 * kQueries * kMaxWindow + kVectorBytes;

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t tiles(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }

template <typename A>
A* at(const TensorView& map, int64_t b, int64_t c, int64_t h, int64_t w) {
  return static_cast<A*>(map.data) + b * map.stride[0] + c * map.stride[1] + h * map.stride[2] +
         w * map.stride[3];
}

// The K weights of a position, side by side.
template <typename A>
A* weights_at(const TensorView& weights, int64_t b, int64_t head, int64_t h, int64_t w) {
  return static_cast<A*>(weights.data) + b * weights.stride[0] + head * weights.stride[1] +
         h * weights.stride[3] + w * weights.stride[4];
}

// out[j * Q + q] = factor * <query q, key q + j> over `channels`; the queries stand query_stride
// apart, key u at offsets[u]. Writes up to kLanes - 1 values more.
template <int Q, int J, typename A>
CTXOPS_INLINE void dots(const A* query, int64_t query_stride, const A* key, const int64_t* offsets,
                        int64_t channels, A factor, A* out) {
  Vector<A> sum[J * Q] = {};
  const A* keys[Q + J - 1];
  for (int u = 0; u < Q + J - 1; ++u) keys[u] = key + offsets[u];
  const auto add = [&](int64_t c, const auto& load) CTXOPS_INLINE_LAMBDA {
    Vector<A> q[Q];
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) q[i] = load(query + i * query_stride + c);
#pragma GCC unroll 16
    for (int u = 0; u < Q + J - 1; ++u) {
      const Vector<A> k = load(keys[u] + c);
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) {
        if (u >= i && u - i < J) sum[(u - i) * Q + i] += q[i] * k;
      }
    }
  };
  const int64_t whole = channels / kLanes<A> * kLanes<A>;
  for (int64_t c = 0; c < whole; c += kLanes<A>) {
    add(c, [](const A* from) CTXOPS_INLINE_LAMBDA { return load_vector(from); });
  }
  if (whole < channels) {
    const int64_t rest = channels - whole;
    add(whole, [&](const A* from) CTXOPS_INLINE_LAMBDA { return load_vector(from, rest); });
  }
  store_sums<A, J * Q>(out, sum, factor);
}

// The same for a window row of any length.
template <int Q, typename A>
void dots_of_row(const A* query, int64_t query_stride, const A* key, const int64_t* offsets,
                 int64_t columns, int64_t channels, A factor, A* out) {
  static_assert(kColumns == 5, "one case for each number of columns");
  for (int64_t left = columns, now; left > 0; left -= now) {
    now = smaller(left, kColumns);
    switch (now) {
      case 1: dots<Q, 1>(query, query_stride, key, offsets, channels, factor, out); break;
      case 2: dots<Q, 2>(query, query_stride, key, offsets, channels, factor, out); break;
      case 3: dots<Q, 3>(query, query_stride, key, offsets, channels, factor, out); break;
      case 4: dots<Q, 4>(query, query_stride, key, offsets, channels, factor, out); break;
      default: dots<Q, 5>(query, query_stride, key, offsets, channels, factor, out); break;
    }
    offsets += now;
    out += now * Q;
  }
}

// U vectors of the channels of Q outputs: out q = sum over rows i and columns j of
// weights[(i * length + j) * Q + q] * value(i, q + j). Only the columns begin <= q + j < end are
// inside the map; `value` is (0, begin).
template <int Q, int U, typename A, typename Load, typename Store>
CTXOPS_INLINE void mix(const A* value, int64_t row_stride, int64_t column_stride, int64_t rows,
                       int64_t length, int64_t begin, int64_t end, const A* weights, A* out,
                       int64_t out_stride, const Load& load, const Store& store) {
  Vector<A> sum[Q][U] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const A* from = value + i * row_stride;
    for (int64_t u = begin; u < end; ++u, from += column_stride) {
      const A* w = weights + (i * length + u) * Q;
      Vector<A> v[U];
#pragma GCC unroll 8
      for (int k = 0; k < U; ++k) v[k] = load(from + k * kLanes<A>);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        // A value outside the window of q may be infinite: it must not meet a weight of 0.
        if (u < q || u - q >= length) continue;
        const A weight = w[q - q * Q];
#pragma GCC unroll 8
        for (int k = 0; k < U; ++k) sum[q][k] += weight * v[k];
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int k = 0; k < U; ++k) store(out + q * out_stride + k * kLanes<A>, sum[q][k]);
  }
}

// In place: the logits (count, Q) of Q queries -> their softmax over count neighbours and `outside`
// more of logit 0, each of which gets the weight outside_weight[q]. Writes whole vectors.
template <int Q, typename A>
void softmax(A* logits, int64_t count, int64_t outside, A* outside_weight) {
  const auto more = [](Vector<A> a, Vector<A> b)
                        CTXOPS_INLINE_LAMBDA -> Vector<A> { return a > b ? a : b; };
  const auto plus = [](Vector<A> a, Vector<A> b)
                        CTXOPS_INLINE_LAMBDA -> Vector<A> { return a + b; };
  const A infinity = static_cast<A>(__builtin_inff());
  for (int i = 0; i < kLanes<A>; ++i) logits[count * Q + i] = -infinity;
  Vector<A> most = Vector<A>{} + (outside > 0 ? A(0) : -infinity);
  for (int64_t i = 0; i < count * Q; i += kLanes<A>) most = more(load_vector(logits + i), most);
  most = reduce_lanes<Q, A>(most, more);
  Vector<A> sum = {};
  for (int64_t i = 0; i < count * Q; i += kLanes<A>) {
    const Vector<A> x = exp_nonpositive(load_vector(logits + i) - most);
    store_vector(logits + i, x);
    sum += x;
  }
  const Vector<A> rest = outside > 0 ? exp_nonpositive(-most) : Vector<A>{};
  sum = reduce_lanes<Q, A>(sum, plus) + static_cast<A>(outside) * rest;
  for (int64_t i = 0; i < count * Q; i += kLanes<A>) {
    store_vector(logits + i, load_vector(logits + i) / sum);
  }
  const Vector<A> share = rest / sum;
  for (int q = 0; q < Q; ++q) outside_weight[q] = share[q];
}

// A class of one axis.
struct ClassAxis {
  const WindowAxis& axis;
  int64_t residue, steps;

  ClassAxis(const WindowAxis& axis, int64_t residue)
      : axis(axis), residue(residue), steps(class_steps(axis, residue)) {}
  int64_t position(int64_t step) const { return residue + step * axis.dilation; }
  int64_t start(int64_t query) const { return window_start(axis, query, steps); }

  // The steps that a query sees, those outside the class included; the queries that see a key.
  StepRange keys(int64_t query) const { return {start(query), start(query) + axis.kernel}; }
  StepRange queries(int64_t key) const {
    if (axis.border == Border::shift) return queries_of(axis, key, steps);
    const int64_t before = axis.kernel / 2;
    return {key - (axis.kernel - 1 - before), key + before + 1};
  }
  StepRange inside(StepRange range) const {
    return {larger(range.begin, 0), smaller(range.end, steps)};
  }
};

// Positions of one class, `count` rows of some columns side by side, and the steps that they see.
struct Block {
  int64_t b, head;
  const ClassAxis &row_class, &column_class;
  int64_t row, column, row_count;
  StepRange rows[kRows];  // of each row: what is inside the class
  int64_t most_rows;      // that one of them sees
  StepRange columns;      // of the first column; each other one sees a step further

  int64_t length() const { return columns.end - columns.begin; }
  int64_t rows_seen(int64_t r) const { return rows[r].end - rows[r].begin; }
  int64_t h(int64_t r) const { return row_class.position(row + r); }
  int64_t w(int64_t q) const { return column_class.position(column + q); }
  // Behind the last step that `count` columns see.
  int64_t seen_end(int64_t count) const { return columns.end + count - 1; }
  // Of `count` columns and what they see: those inside the class, counted from columns.begin.
  StepRange seen(int64_t count) const {
    const StepRange all = column_class.inside({columns.begin, columns.end + count - 1});
    return {all.begin - columns.begin, all.end - columns.begin};
  }
};

// Calls f(block, integral constant Q) for all positions of a map in blocks of Q columns. `sees`
// tells what a position sees along an axis.
template <typename F>
void for_blocks(const Window& window, int64_t B, int64_t heads, int64_t position_bytes,
                int64_t work, Threads threads, StepRange (ClassAxis::*sees)(int64_t) const,
                const F& f) {
  const WindowAxis &rows = window.rows, &columns = window.columns;
  const int64_t row_classes = smaller(rows.dilation, rows.extent);
  const int64_t column_classes = smaller(columns.dilation, columns.extent);
  const int64_t reach = rows.border == Border::shift ? 2 : 1;
  const int64_t row_weights = reach * rows.kernel * columns.kernel * kQueries + kVectorBytes / 4;
  const int64_t block_rows = clamp(kMaxWeights / row_weights, 1, kRows);
  const int64_t rows_seen = smaller(rows.kernel + block_rows - 1, class_steps(rows, 0));
  const int64_t most_columns =
      larger(kTileBytes / (position_bytes * rows_seen) - columns.kernel, 4 * kQueries);
  const int64_t row_tiles = tiles(class_steps(rows, 0), kTileRows);
  // Of nearly one width, whole blocks wide.
  const int64_t steps = class_steps(columns, 0), column_tiles = tiles(steps, most_columns);
  const int64_t tile_columns = tiles(tiles(steps, column_tiles), kQueries) * kQueries;
  const int64_t items = B * heads * row_classes * row_tiles * column_tiles * column_classes;
  parallel_for(items, work, threads, [&](int64_t item) {
    const auto next = [&](int64_t count) {
      const int64_t index = item % count;
      item /= count;
      return index;
    };
    // Neighbouring items work on neighbouring columns of the same rows.
    const ClassAxis column_class(columns, next(column_classes));
    const int64_t left = next(column_tiles) * tile_columns, top = next(row_tiles) * kTileRows;
    const ClassAxis row_class(rows, next(row_classes));
    const int64_t head = next(heads), b = item;
    const int64_t right = smaller(left + tile_columns, column_class.steps);
    const int64_t bottom = smaller(top + kTileRows, row_class.steps);
    for (int64_t row = top; row < bottom; row += block_rows) {
      Block block{b,  head, row_class, column_class, row, 0, smaller(block_rows, bottom - row),
                  {}, 0,    {}};
      for (int64_t r = 0; r < block.row_count; ++r) {
        block.rows[r] = row_class.inside((row_class.*sees)(row + r));
        block.most_rows = larger(block.most_rows, block.rows_seen(r));
      }
      for (int64_t column = left; column < right;) {
        // The last columns are computed twice rather than one by one.
        const int64_t start = right - left < kQueries ? column : smaller(column, right - kQueries);
        const StepRange seen = (column_class.*sees)(start);
        bool together = start + kQueries <= right;
        for (int64_t q = 1; q < kQueries && together; ++q) {
          const StepRange other = (column_class.*sees)(start + q);
          together = other.begin == seen.begin + q && other.end == seen.end + q;
        }
        block.column = together ? start : column;
        block.columns = (column_class.*sees)(block.column);
        if (together) {
          f(block, std::integral_constant<int, kQueries>{});
          column = start + kQueries;
        } else {
          f(block, std::integral_constant<int, 1>{});
          ++column;
        }
      }
    }
    stream_fence();
  });
}

template <typename Params>
struct Problem : Params {
  Window window;
  Threads threads;

  int64_t neighbours() const { return window.rows.kernel * window.columns.kernel; }
  int64_t work(const TensorView& map) const { return element_count(map) * neighbours(); }
  // Would the caches keep nothing of a result? A pass over the map touches about four maps.
  template <typename A>
  bool stream(const TensorView& map) const {
    return 4 * element_count(map) * static_cast<int64_t>(sizeof(A)) > kCache;
  }
};
using Forward = Problem<NeighborhoodAttentionForward>;
using Backward = Problem<NeighborhoodAttentionBackward>;

// Where the weights of row r of a block begin. Between rows is room for whole vectors.
template <int Q>
int64_t weights_of_row(const Block& block, int64_t r) {
  return r * (block.most_rows * block.length() * Q + kVectorBytes / 4);
}

// Fetches Q columns of a row of a map, what the next block is the first to need: from
// block.column + Q on, or from block.seen_end(Q) of what it sees. A few positions of a
// channels_last map fill a page of memory.
template <int Q, typename A>
CTXOPS_INLINE void fetch_ahead(const Block& block, const TensorView& map, int64_t heads,
                               int64_t row, int64_t column) {
  const int64_t channels = map.size[1] / heads;
  const ClassAxis& columns = block.column_class;
  const A* from = at<A>(map, block.b, block.head * channels, block.row_class.position(row),
                        columns.position(smaller(column, columns.steps - Q)));
  for (int64_t q = 0; q < Q; ++q, from += columns.axis.dilation * map.stride[3]) {
    fetch(from, channels);
  }
}

// Adds the bias to the products of a block with keys.
template <int Q, typename A>
void add_bias(const Block& block, const TensorView& bias, A* out) {
  const int64_t kw = block.column_class.axis.kernel, to_self = block.row_class.axis.kernel - 1;
  // Neighbour j is as many steps away from each of the Q queries.
  const int64_t left = block.columns.begin - block.column + kw - 1;
  for (int64_t r = 0; r < block.row_count; ++r) {
    const int64_t top = block.rows[r].begin - (block.row + r) + to_self;
    const A* from = static_cast<const A*>(bias.data) + block.head * bias.stride[0] +
                    top * bias.stride[1] + left;
    A* row = out + weights_of_row<Q>(block, r);
    for (int64_t i = 0; i < block.rows_seen(r); ++i) {
      for (int64_t j = 0; j < kw; ++j, row += Q) {
        for (int q = 0; q < Q; ++q) row[q] += from[i * bias.stride[1] + j];
      }
    }
  }
}

// The products (rows_seen, length, Q) of every row of a block with what it sees, and the bias if
// there is one; `outside` where that is not in the map.
template <int Q, typename A>
void products(const Block& block, const TensorView& own, const TensorView& seen, int64_t heads,
              A factor, const TensorView* bias, A outside, A* out) {
  const int64_t channels = own.size[1] / heads, c = block.head * channels;
  const int64_t length = block.length(), stride = block.column_class.axis.dilation;
  int64_t offsets[2 * kMaxWindow + kQueries];
  for (int64_t u = 0; u < length + Q - 1; ++u) {
    const int64_t step = clamp(block.columns.begin + u, 0, block.column_class.steps - 1);
    offsets[u] = block.column_class.position(step) * seen.stride[3];
  }
  const int64_t last = block.row_count - 1;
  for (int64_t s = block.rows[0].begin; s < block.rows[last].end; ++s) {
    const A* key = at<A>(seen, block.b, c, block.row_class.position(s), 0);
    for (int64_t r = 0; r <= last; ++r) {
      if (s < block.rows[r].begin || s >= block.rows[r].end) continue;
      if (s == block.rows[r].begin) {
        fetch_ahead<Q, A>(block, own, heads, block.row + r, block.column + Q);
      }
      if (s == block.rows[r].end - 1) fetch_ahead<Q, A>(block, seen, heads, s, block.seen_end(Q));
      A* to = out + weights_of_row<Q>(block, r) + (s - block.rows[r].begin) * length * Q;
      dots_of_row<Q>(at<A>(own, block.b, c, block.h(r), block.w(0)), stride * own.stride[3], key,
                     offsets, length, channels, factor, to);
    }
  }
  if (bias != nullptr) add_bias<Q>(block, *bias, out);
  const StepRange inside = block.seen(Q);
  for (int64_t u = 0; u < length + Q - 1; ++u) {
    if (u >= inside.begin && u < inside.end) continue;
    for (int64_t r = 0; r <= last; ++r) {
      A* row = out + weights_of_row<Q>(block, r);
      for (int64_t i = 0; i < block.rows_seen(r); ++i) {
        for (int64_t q = larger(0, u - length + 1); q < smaller(Q, u + 1); ++q) {
          row[(i * length + u - q) * Q + q] = outside;
        }
      }
    }
  }
}

// The same for row r of what sums() takes; called where there is other work, not from there.
template <int Q, typename A>
CTXOPS_INLINE void fetch_for_sums(const Block& block, const TensorView& own, const TensorView& seen,
                                  int64_t heads, int64_t r, bool stream) {
  fetch_ahead<Q, A>(block, seen, heads, block.rows[r].end - 1, block.seen_end(Q));
  if (!stream) fetch_ahead<Q, A>(block, own, heads, block.row + r, block.column + Q);
}

// own := for every position of a block, the weighted sum of what it sees; past the caches if
// `stream`.
template <int Q, typename A>
void sums(const Block& block, const TensorView& own, const TensorView& seen, int64_t heads,
          const A* weights, bool stream) {
  const int64_t channels = own.size[1] / heads, first = block.head * channels;
  const int64_t dilation = block.column_class.axis.dilation;
  const StepRange inside = block.seen(Q);
  const int64_t left = block.column_class.position(block.columns.begin + inside.begin);
  const auto all_rows = [&](int64_t c, auto vectors, const auto& load, const auto& store) {
    constexpr int U = decltype(vectors)::value;
    for (int64_t r = 0; r < block.row_count; ++r) {
      const int64_t top = block.row_class.position(block.rows[r].begin);
      mix<Q, U, A>(at<A>(seen, block.b, first + c, top, left),
                   block.row_class.axis.dilation * seen.stride[2], dilation * seen.stride[3],
                   block.rows_seen(r), block.length(), inside.begin, inside.end,
                   weights + weights_of_row<Q>(block, r),
                   at<A>(own, block.b, first + c, block.h(r), block.w(0)), dilation * own.stride[3],
                   load, store);
    }
  };
  const auto load = [](const A* from) CTXOPS_INLINE_LAMBDA { return load_vector(from); };
  const auto store = [&](A* to, Vector<A> v) CTXOPS_INLINE_LAMBDA {
    if (stream && is_aligned(to)) {
      stream_vector<A>(to, v);
    } else {
      store_vector(to, v);
    }
  };
  int64_t c = 0;
  for (; c + kUnroll * kLanes<A> <= channels; c += kUnroll * kLanes<A>) {
    all_rows(c, std::integral_constant<int, kUnroll>{}, load, store);
  }
  for (; c + kLanes<A> <= channels; c += kLanes<A>) {
    all_rows(c, std::integral_constant<int, 1>{}, load, store);
  }
  if (const int64_t rest = channels - c; rest > 0) {
    all_rows(
        c, std::integral_constant<int, 1>{},
        [&](const A* from) CTXOPS_INLINE_LAMBDA { return load_vector(from, rest); },
        [&](A* to, Vector<A> v) CTXOPS_INLINE_LAMBDA { store_vector(to, v, rest); });
  }
}

template <typename A>
void forward(const Forward& p) {
  const bool save = element_count(p.weights) > 0, mixes = element_count(p.value) > 0;
  const bool zeros = p.window.rows.border == Border::zeros;
  const int64_t K = p.neighbours(), kernel = p.window.columns.kernel;
  const int64_t channels = p.query.size[1] + (mixes ? p.value.size[1] : 0);
  const A outside = zeros ? A(0) : -static_cast<A>(__builtin_inff());
  const TensorView* bias = element_count(p.bias) > 0 ? &p.bias : nullptr;
  const bool stream = p.template stream<A>(p.query);
  const auto compute = [&](const Block& block, auto queries) {
    constexpr int Q = decltype(queries)::value;
    A logits[kMaxWeights], rest[Q];
    products<Q>(block, p.query, p.key, p.num_heads, static_cast<A>(p.scale), bias, outside, logits);

    for (int64_t r = 0; r < block.row_count; ++r) {
      A* row = logits + weights_of_row<Q>(block, r);
      const int64_t count = block.rows_seen(r) * kernel;
      if (mixes) fetch_for_sums<Q, A>(block, p.output, p.value, p.num_heads, r, stream);
      softmax<Q>(row, count, zeros ? K - count : 0, rest);
      for (int q = 0; save && q < Q; ++q) {
        A* to = weights_at<A>(p.weights, block.b, block.head, block.h(r), block.w(q));
        const int64_t start = block.row_class.start(block.row + r);
        const int64_t above = (block.rows[r].begin - start) * kernel;
        for (int64_t n = 0; n < above; ++n) to[n] = rest[q];
        for (int64_t n = 0; n < count; ++n) to[above + n] = row[n * Q + q];
        for (int64_t n = above + count; n < K; ++n) to[n] = rest[q];
      }
    }
    if (mixes) sums<Q>(block, p.output, p.value, p.num_heads, logits, stream);
  };
  for_blocks(p.window, p.query.size[0], p.num_heads, channels / p.num_heads * sizeof(A),
             p.work(p.query), p.threads, &ClassAxis::keys, compute);
}

// d(logits) = weights * (d(weights) - sum of weights * d(weights)), and d(query).
template <typename A>
void backward_queries(const Backward& p) {
  const int64_t channels = p.key.size[1] + p.value.size[1], kernel = p.window.columns.kernel;
  const bool stream = p.template stream<A>(p.grad);
  const auto compute = [&](const Block& block, auto queries) {
    constexpr int Q = decltype(queries)::value;
    A grads[kMaxWeights];
    products<Q>(block, p.grad, p.value, p.num_heads, A(1), nullptr, A(0), grads);
    for (int64_t r = 0; r < block.row_count; ++r) {
      A* row = grads + weights_of_row<Q>(block, r);
      const int64_t start = block.row_class.start(block.row + r);
      const int64_t above = (block.rows[r].begin - start) * kernel;
      const int64_t count = block.rows_seen(r) * kernel;
      fetch_for_sums<Q, A>(block, p.grad_query, p.key, p.num_heads, r, stream);
      for (int q = 0; q < Q; ++q) {
        const int64_t h = block.h(r), w = block.w(q);
        const A* weight = weights_at<A>(p.weights, block.b, block.head, h, w) + above;
        A* to = weights_at<A>(p.grad_logits, block.b, block.head, h, w) + above;
        A mean = 0;
        for (int64_t n = 0; n < count; ++n) mean += weight[n] * row[n * Q + q];
        for (int64_t n = 0; n < count; ++n) {
          to[n] = weight[n] * (row[n * Q + q] - mean);
          row[n * Q + q] = static_cast<A>(p.scale) * to[n];
        }
      }
    }
    sums<Q>(block, p.grad_query, p.key, p.num_heads, grads, stream);
  };
  for_blocks(p.window, p.grad.size[0], p.num_heads, channels / p.num_heads * sizeof(A),
             p.work(p.grad), p.threads, &ClassAxis::keys, compute);
}

// d(key) and d(value): each gathers from the queries that see it.
template <typename A>
void backward_keys(const Backward& p) {
  const int64_t channels = p.query.size[1] + p.grad.size[1], kernel = p.window.columns.kernel;
  const bool stream = p.template stream<A>(p.grad);
  const auto compute = [&](const Block& block, auto keys) {
    constexpr int Q = decltype(keys)::value;
    A gathered[kMaxWeights];
    const int64_t length = block.length();
    const StepRange inside = block.seen(Q);
    const auto add = [&](const TensorView& own, const TensorView& seen, const TensorView& from,
                         A factor) {
      for (int64_t r = 0; r < block.row_count; ++r) {
        fetch_for_sums<Q, A>(block, own, seen, p.num_heads, r, stream);
        A* row = gathered + weights_of_row<Q>(block, r);
        for (int64_t s = block.rows[r].begin; s < block.rows[r].end; ++s, row += length * Q) {
          const int64_t h = block.row_class.position(s);
          const int64_t i = block.row + r - block.row_class.start(s);
          for (int64_t u = inside.begin; u < inside.end; ++u) {
            const int64_t step = block.columns.begin + u;
            const int64_t j = block.column - block.column_class.start(step);
            const A* weight =
                weights_at<A>(from, block.b, block.head, h, block.column_class.position(step));
            for (int64_t q = larger(0, u - length + 1); q < smaller(Q, u + 1); ++q) {
              row[(u - q) * Q + q] = factor * weight[i * kernel + j + q];
            }
          }
        }
      }
      sums<Q>(block, own, seen, p.num_heads, gathered, stream);
    };
    add(p.grad_value, p.grad, p.weights, A(1));
    add(p.grad_key, p.query, p.grad_logits, static_cast<A>(p.scale));
  };
  for_blocks(p.window, p.grad.size[0], p.num_heads, channels / p.num_heads * sizeof(A),
             p.work(p.grad), p.threads, &ClassAxis::queries, compute);
}

// d(bias): the sum of d(logits), of either body, over the positions that see a neighbour so many
// steps away. An item has the columns of one row of one head.
template <typename A>
void backward_bias(const NeighborhoodAttentionBackward& p, Threads threads) {
  const Window window = window_of(p);
  const WindowAxis &rows = window.rows, &columns = window.columns;
  const int64_t height = 2 * rows.kernel - 1, width = 2 * columns.kernel - 1;
  const int64_t classes = smaller(columns.dilation, columns.extent);
  parallel_for(p.num_heads * height, element_count(p.weights), threads, [&](int64_t item) {
    const int64_t head = item / height, down = item % height - (rows.kernel - 1);
    double sums[2 * kMaxWindow];
    for (int64_t j = 0; j < width; ++j) sums[j] = 0;
    for (int64_t b = 0; b < p.grad.size[0]; ++b) {
      for (int64_t h = 0; h < rows.extent; ++h) {
        const int64_t i = neighbour_at(rows, h, down);
        for (int64_t residue = 0; i >= 0 && residue < classes; ++residue) {
          const ClassAxis column_class(columns, residue);
          for (int64_t column = 0; column < column_class.steps; ++column) {
            const StepRange inside = column_class.inside(column_class.keys(column));
            const int64_t w = column_class.position(column), start = column_class.start(column);
            const A* grad = weights_at<A>(p.grad_logits, b, head, h, w);
            for (int64_t s = inside.begin; s < inside.end; ++s) {
              const int64_t n = i * columns.kernel + s - start;
              sums[s - column + columns.kernel - 1] += grad[n * p.grad_logits.stride[2]];
            }
          }
        }
      }
    }
    A* to = static_cast<A*>(p.grad_bias.data) + item * width;
    for (int64_t j = 0; j < width; ++j) to[j] = static_cast<A>(sums[j]);
  });
}

// f(problem, Tag<A>{}). The kernels are compiled for the accumulators only; half precision is
// widened by the caller.
template <typename Params, typename F>
const char* with_problem(const Params& params, Threads threads, const F& f) {
  return dispatch(params, [&](auto tag) -> const char* {
    if (element_count(params.weights) > 0 && !unit_stride(params.weights, 2)) {
      return "the weights of a position must lie side by side";
    }
    if constexpr (std::is_floating_point_v<typename decltype(tag)::type>) {
      f(Problem<Params>{params, window_of(params), threads}, tag);
      return nullptr;
    }
    return "the CPU takes float32 and float64";
  });
}

}  // namespace

const char* neighborhood_attention_forward(const NeighborhoodAttentionForward& params,
                                           Threads threads) {
  if (inner_dimension(params) == 3) {
    return neighborhood_attention_forward_along_columns(params, threads);
  }
  return with_problem(params, threads,
                      [](const Forward& p, auto tag) { forward<typename decltype(tag)::type>(p); });
}

const char* neighborhood_attention_backward(const NeighborhoodAttentionBackward& params,
                                            Threads threads) {
  const char* error = inner_dimension(params) == 3
                          ? neighborhood_attention_backward_along_columns(params, threads)
                          : with_problem(params, threads, [](const Backward& p, auto tag) {
                              using A = typename decltype(tag)::type;
                              backward_queries<A>(p);
                              backward_keys<A>(p);
                            });
  if (error != nullptr || element_count(params.grad_bias) == 0) return error;
  return dispatch(params, [&](auto tag) -> const char* {
    backward_bias<Accumulator<typename decltype(tag)::type>>(params, threads);
    return nullptr;
  });
}

}  // namespace CTXOPS_ISA
}  // namespace ctxops
