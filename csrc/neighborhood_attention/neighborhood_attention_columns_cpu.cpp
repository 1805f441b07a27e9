// SPDX-License-Identifier: Apache-2.0
// Vectors run along the columns: for maps whose columns lie side by side. A tile is a few rows of
// one class and some neighbouring columns. What its rows see is packed a few channels at a time,
// with zeros outside the map, into a ring of rows: each is packed once for all rows that see it,
// and the ring stays in the inner caches. A lane's window stands in the packed row at the same
// offsets as its neighbour's.
#include "common/parallel.h"
#include "common/simd.h"
#include "neighborhood_attention/neighborhood_attention.h"

namespace ctxops {
namespace CTXOPS_ISA {
namespace {

// What stays in registers: kVectors x kColumns sums of products, or kVectors x kUnroll of output.
constexpr int kVectors = 2;
constexpr int kColumns = 5;
constexpr int kUnroll = 4;

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 128;
constexpr int64_t kChannels = 64;  // at most so many are packed together
constexpr int64_t kRingBytes = 1 << 17;

// The weights of one row of a tile as narrow as a vector fit, and so do the packed rows of one
// channel: where windows slide inside the map, fewer queries than twice a window's length see a
// key, along each axis.
template <typename A>
constexpr int64_t kMaxWeights = 4 * kMaxWindowAlongColumns * kLanes<A>;

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t tiles(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }

// A query sees the keys of its window, a key the queries whose windows hold it.
enum class Seen { keys, queries };

inline StepRange steps_seen(const WindowAxis& axis, Seen seen, int64_t step, int64_t steps) {
  if (seen == Seen::keys) {
    const int64_t start = window_start(axis, step, steps);
    return {start, start + axis.kernel};
  }
  if (axis.border == Border::shift) return queries_of(axis, step, steps);
  const int64_t before = axis.kernel / 2;
  return {step - (axis.kernel - 1 - before), step + before + 1};
}

// The most steps inside a class that one of its positions sees.
inline int64_t most_seen(const WindowAxis& axis, Seen seen) {
  const int64_t steps = class_steps(axis, 0), kernel = axis.kernel;
  if (seen == Seen::keys || axis.border != Border::shift) return smaller(kernel, steps);
  // Where the first and the last window overlap all queries see what is in both.
  return steps <= 2 * kernel ? smaller(2 * kernel - 1, steps) : kernel + kernel / 2;
}

struct Tile {
  const Window& window;
  Seen seen;
  int64_t b, head;

  // Rows: steps top ... bottom - 1 of a class.
  int64_t residue, steps, top, bottom;
  int64_t slots;  // of the ring

  // Columns: lanes 0 ... width - 1, and what fills the last vector. A lane sees `columns` others,
  // the first one `shift` to its right. In the packed row of a channel they stand at lane + j *
  // step.
  int64_t left, width, lanes;
  int64_t columns, shift, step, stride;
  // Not so the lanes outside begin ... end - 1, from where the window slides: each sees so many,
  // from column `first` on.
  bool slides;
  int64_t begin, end;
  int32_t first[kTileColumns], count[kTileColumns];

  Tile(const Window& window, Seen seen) : window(window), seen(seen) {}
  int64_t h(int64_t row) const { return residue + row * window.rows.dilation; }
  StepRange rows(int64_t row) const {
    const StepRange all = steps_seen(window.rows, seen, row, steps);
    return {larger(all.begin, 0), smaller(all.end, steps)};
  }
  // The column that lane 0 sees as its j-th, as far as the window does not slide there.
  int64_t column(int64_t j) const { return left + shift + j * window.columns.dilation; }
  // The lanes whose j-th column is inside the map.
  StepRange inside(int64_t j) const {
    return {clamp(-column(j), 0, width), clamp(window.columns.extent - column(j), 0, width)};
  }
  // f(lane) for the lanes that see something else.
  template <typename F>
  CTXOPS_INLINE void other_lanes(const F& f) const {
    for (int64_t t = 0; t < begin; ++t) f(t);
    for (int64_t t = end; t < lanes; ++t) f(t);
  }
};

template <typename A>
struct Scratch {
  A weights[kMaxWeights<A>];  // (rows, what they see, lanes)
  A ring[kMaxWeights<A>];     // (slots, channels, stride)
  A own[kChannels * kTileColumns];
};

template <typename T>
CTXOPS_INLINE T* at(const TensorView& map, int64_t b, int64_t c, int64_t h) {
  return static_cast<T*>(map.data) + b * map.stride[0] + c * map.stride[1] + h * map.stride[2];
}

// Row h of the n-th weights.
template <typename A>
CTXOPS_INLINE A* weights_at(const TensorView& weights, const Tile& tile, int64_t n, int64_t h) {
  return static_cast<A*>(weights.data) + tile.b * weights.stride[0] +
         tile.head * weights.stride[1] + n * weights.stride[2] + h * weights.stride[3];
}

// to[i] = row[start + i], 0 outside of the row.
template <typename T, typename A>
void pack(const T* row, int64_t extent, int64_t start, int64_t count, A* to) {
  const int64_t begin = clamp(-start, 0, count), end = clamp(extent - start, begin, count);
  for (int64_t i = 0; i < begin; ++i) to[i] = 0;
  for (int64_t i = begin; i < end; ++i) to[i] = load(row[start + i]);
  for (int64_t i = end; i < count; ++i) to[i] = 0;
}

// What the tile sees of row h.
template <typename T, typename A>
void pack_seen(const Tile& tile, const TensorView& map, int64_t c, int64_t channels, int64_t h,
               A* to) {
  const int64_t extent = tile.window.columns.extent, dilation = tile.window.columns.dilation;
  for (int64_t k = 0; k < channels; ++k, to += tile.stride) {
    const T* row = at<T>(map, tile.b, c + k, h);
    if (tile.step < tile.lanes) {
      pack(row, extent, tile.column(0), tile.lanes + (tile.columns - 1) * tile.step, to);
      continue;
    }
    for (int64_t j = 0; j < tile.columns; ++j) {
      A* piece = to + j * tile.step;
      pack(row, j < tile.window.columns.kernel ? extent : 0, tile.column(j) + tile.begin,
           tile.end - tile.begin, piece + tile.begin);
      tile.other_lanes([&](int64_t t) CTXOPS_INLINE_LAMBDA {
        piece[t] = j < tile.count[t] ? load(row[tile.first[t] + j * dilation]) : 0;
      });
    }
  }
}

// The ring of what the rows of a tile see, from which it leaves as they go down.
template <typename T, typename A>
struct Ring {
  const Tile& tile;
  const TensorView& map;
  A* memory;
  int64_t c, channels;
  int64_t next = -1;  // the row to be packed next

  CTXOPS_INLINE A* slot(int64_t row) const {
    return memory + row % tile.slots * channels * tile.stride;
  }
  CTXOPS_INLINE void see(StepRange rows) {
    for (next = larger(next, rows.begin); next < rows.end; ++next) {
      pack_seen<T>(tile, map, c, channels, tile.h(next), slot(next));
    }
  }
};

// As many channels as the ring holds.
template <typename A>
int64_t channels_of(const Tile& tile) {
  const int64_t most = kRingBytes / static_cast<int64_t>(sizeof(A)) / (tile.slots * tile.stride);
  return most >= kChannels ? kChannels : larger(most / kUnroll * kUnroll, 1);
}

// out[j] = factor * (out[j], if `more`, + <query, key at j * step>) for J columns of a window.
template <int J, int V, typename A>
CTXOPS_INLINE void dots(const A* query, int64_t query_stride, const A* key, int64_t key_stride,
                        int64_t step, int64_t channels, bool more, A factor, A* out,
                        int64_t out_stride) {
  Vector<A> sum[J * V] = {};
  for (int64_t c = 0; c < channels; ++c, query += query_stride, key += key_stride) {
    Vector<A> q[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) q[v] = load_vector(query + v * kLanes<A>);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[j * V + v] += q[v] * load_vector(key + j * step + v * kLanes<A>);
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      A* to = out + j * out_stride + v * kLanes<A>;
      Vector<A> total = sum[j * V + v];
      if (more) total += load_vector(to);
      store_vector<A>(to, total * factor);
    }
  }
}

// The same for V vectors of lanes and whole windows.
template <int V, typename A>
void dots_of_windows(const Tile& tile, const A* query, const A* ring, StepRange rows,
                     int64_t channels, bool more, A factor, A* out) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const A* key = ring + row % tile.slots * channels * tile.stride;
    const auto some = [&](auto columns) CTXOPS_INLINE_LAMBDA {
      dots<decltype(columns)::value, V>(query, tile.lanes, key, tile.stride, tile.step, channels,
                                        more, factor, out, tile.lanes);
    };
    static_assert(kColumns == 5, "one case for each number of columns");
    for (int64_t left = tile.columns, now; left > 0; left -= now) {
      now = smaller(left, kColumns);
      switch (now) {
        case 1: some(std::integral_constant<int, 1>{}); break;
        case 2: some(std::integral_constant<int, 2>{}); break;
        case 3: some(std::integral_constant<int, 3>{}); break;
        case 4: some(std::integral_constant<int, 4>{}); break;
        default: some(std::integral_constant<int, 5>{}); break;
      }
      key += now * tile.step;
      out += now * tile.lanes;
    }
  }
}

// out = the sum of weights times what V vectors of lanes see, for U channels.
template <int U, int V, typename A>
CTXOPS_INLINE void mix(const Tile& tile, const A* weights, const A* ring, StepRange rows,
                       int64_t channels, A* out) {
  Vector<A> sum[U * V] = {};
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const A* value = ring + row % tile.slots * channels * tile.stride;
    for (int64_t j = 0; j < tile.columns; ++j, weights += tile.lanes, value += tile.step) {
      Vector<A> w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = load_vector(weights + v * kLanes<A>);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          sum[u * V + v] += w[v] * load_vector(value + u * tile.stride + v * kLanes<A>);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store_vector<A>(out + u * tile.lanes + v * kLanes<A>, sum[u * V + v]);
    }
  }
}

template <int V, typename A>
void mix_windows(const Tile& tile, const A* weights, const A* ring, StepRange rows,
                 int64_t channels, A* out) {
  int64_t c = 0;
  for (; c + kUnroll <= channels; c += kUnroll) {
    mix<kUnroll, V>(tile, weights, ring + c * tile.stride, rows, channels, out + c * tile.lanes);
  }
  for (; c < channels; ++c) {
    mix<1, V>(tile, weights, ring + c * tile.stride, rows, channels, out + c * tile.lanes);
  }
}

// f(first lane, integral constant V) for all lanes in groups of V vectors.
template <typename A, typename F>
CTXOPS_INLINE void for_lanes(const Tile& tile, const F& f) {
  int64_t t = 0;
  for (; t + kVectors * kLanes<A> <= tile.lanes; t += kVectors * kLanes<A>) {
    f(t, std::integral_constant<int, kVectors>{});
  }
  for (; t < tile.lanes; t += kLanes<A>) f(t, std::integral_constant<int, 1>{});
}

// The weights of a row: those of each row that it sees, of each column, of each lane.
template <typename A>
CTXOPS_INLINE A* weights_of_row(const Tile& tile, Scratch<A>& scratch, int64_t row) {
  return scratch.weights + (row - tile.top) * tile.slots * tile.columns * tile.lanes;
}

// Adds the bias to the products of a tile with keys.
template <typename A>
void add_bias(const Tile& tile, const TensorView& bias, Scratch<A>& scratch) {
  const WindowAxis &rows = tile.window.rows, &columns = tile.window.columns;
  for (int64_t row = tile.top; row < tile.bottom; ++row) {
    A* to = weights_of_row(tile, scratch, row);
    const StepRange keys = tile.rows(row);
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      // Of a key in the query's own column.
      const A* from = static_cast<const A*>(bias.data) + tile.head * bias.stride[0] +
                      (key - row + rows.kernel - 1) * bias.stride[1] + columns.kernel - 1;
      for (int64_t j = 0; j < tile.columns; ++j, to += tile.lanes) {
        const A around = from[j - columns.kernel / 2];
        for (int64_t t = tile.begin; t < tile.end; ++t) to[t] += around;
        tile.other_lanes([&](int64_t t) CTXOPS_INLINE_LAMBDA {
          const int64_t left = (tile.first[t] - tile.left - t) / columns.dilation;
          if (j < tile.count[t]) to[t] += from[left + j];
        });
      }
    }
  }
}

// scratch.weights = factor * the products of every position with what it sees, and the bias if
// there is one; `outside` where that is not in the map.
template <typename T, typename A>
void products(const Tile& tile, const TensorView& own, const TensorView& seen, int64_t heads,
              A factor, const TensorView* bias, A outside, Scratch<A>& scratch) {
  const int64_t channels = own.size[1] / heads, first = tile.head * channels;
  const int64_t most = channels_of<A>(tile);
  for (int64_t c = 0; c < channels; c += most) {
    const int64_t now = smaller(most, channels - c);
    Ring<T, A> ring{tile, seen, scratch.ring, first + c, now};
    for (int64_t row = tile.top; row < tile.bottom; ++row) {
      const StepRange rows = tile.rows(row);
      ring.see(rows);
      for (int64_t k = 0; k < now; ++k) {
        pack(at<T>(own, tile.b, first + c + k, tile.h(row)), tile.window.columns.extent, tile.left,
             tile.lanes, scratch.own + k * tile.lanes);
      }
      A* out = weights_of_row(tile, scratch, row);
      for_lanes<A>(tile, [&](int64_t t, auto vectors) CTXOPS_INLINE_LAMBDA {
        dots_of_windows<decltype(vectors)::value>(tile, scratch.own + t, scratch.ring + t, rows,
                                                  now, c > 0, c + now < channels ? A(1) : factor,
                                                  out + t);
      });
    }
  }
  if (bias != nullptr) add_bias(tile, *bias, scratch);
  if (tile.slides) return;
  for (int64_t j = 0; j < tile.columns; ++j) {
    const StepRange inside = tile.inside(j);
    for (int64_t row = tile.top; row < tile.bottom; ++row) {
      const StepRange rows = tile.rows(row);
      A* to = weights_of_row(tile, scratch, row) + j * tile.lanes;
      for (int64_t i = rows.begin; i < rows.end; ++i, to += tile.columns * tile.lanes) {
        for (int64_t t = 0; t < inside.begin; ++t) to[t] = outside;
        for (int64_t t = inside.end; t < tile.width; ++t) to[t] = outside;
      }
    }
  }
}

// own = for every position, factor * the sum of scratch.weights times what it sees.
template <typename T, typename A>
void sums(const Tile& tile, const TensorView& own, const TensorView& seen, int64_t heads, A factor,
          Scratch<A>& scratch) {
  const int64_t channels = own.size[1] / heads, first = tile.head * channels;
  const int64_t most = channels_of<A>(tile);
  for (int64_t c = 0; c < channels; c += most) {
    const int64_t now = smaller(most, channels - c);
    Ring<T, A> ring{tile, seen, scratch.ring, first + c, now};
    for (int64_t row = tile.top; row < tile.bottom; ++row) {
      const StepRange rows = tile.rows(row);
      ring.see(rows);
      const A* weights = weights_of_row(tile, scratch, row);
      for_lanes<A>(tile, [&](int64_t t, auto vectors) CTXOPS_INLINE_LAMBDA {
        mix_windows<decltype(vectors)::value>(tile, weights + t, scratch.ring + t, rows, now,
                                              scratch.own + t);
      });
      for (int64_t k = 0; k < now; ++k) {
        const A* from = scratch.own + k * tile.lanes;
        T* to = at<T>(own, tile.b, first + c + k, tile.h(row)) + tile.left;
        for (int64_t t = 0; t < tile.width; ++t) store(to + t, factor * from[t]);
      }
    }
  }
}

// In place: the logits (count, lanes) -> their softmax over count neighbours and `outside` more of
// logit 0, each of which gets the weight outside_weight[lane].
template <typename A>
void softmax(A* logits, int64_t count, int64_t lanes, int64_t outside, A* outside_weight) {
  const A infinity = static_cast<A>(__builtin_inff());
  for (int64_t t = 0; t < lanes; t += kLanes<A>) {
    Vector<A> most = Vector<A>{} + (outside > 0 ? A(0) : -infinity);
    for (int64_t n = 0; n < count; ++n) {
      const Vector<A> x = load_vector(logits + n * lanes + t);
      most = x > most ? x : most;
    }
    const Vector<A> rest = outside > 0 ? exp_nonpositive(-most) : Vector<A>{};
    Vector<A> sum = static_cast<A>(outside) * rest;
    for (int64_t n = 0; n < count; ++n) {
      const Vector<A> x = exp_nonpositive(load_vector(logits + n * lanes + t) - most);
      store_vector<A>(logits + n * lanes + t, x);
      sum += x;
    }
    for (int64_t n = 0; n < count; ++n) {
      store_vector<A>(logits + n * lanes + t, load_vector(logits + n * lanes + t) / sum);
    }
    store_vector<A>(outside_weight + t, rest / sum);
  }
}

// f(tile, scratch) for all positions of a map.
template <typename A, typename F>
void for_tiles(const Window& window, Seen seen, int64_t B, int64_t heads, int64_t work,
               Threads threads, const F& f) {
  const WindowAxis &rows = window.rows, &columns = window.columns;
  const bool slides = columns.border == Border::shift;
  const int64_t slots = most_seen(rows, seen);
  const int64_t columns_seen = slides ? most_seen(columns, seen) : columns.kernel;
  const int64_t room = kMaxWeights<A> / (slots * columns_seen);  // for lanes
  // At least four rows to a tile, where a window is not too large.
  const int64_t most_lanes = clamp(room / 4 / kLanes<A> * kLanes<A>, kLanes<A>, kTileColumns);
  const int64_t column_tiles = tiles(columns.extent, most_lanes);
  const int64_t tile_columns = tiles(tiles(columns.extent, column_tiles), kLanes<A>) * kLanes<A>;
  const int64_t row_tiles = tiles(class_steps(rows, 0), clamp(room / tile_columns, 1, kTileRows));
  const int64_t tile_rows = tiles(class_steps(rows, 0), row_tiles);
  const int64_t row_classes = smaller(rows.dilation, rows.extent);
  const int64_t items = B * heads * row_classes * row_tiles * column_tiles;
  parallel_for(items, work, threads, [&](int64_t item) {
    const auto next = [&](int64_t count) {
      const int64_t index = item % count;
      item /= count;
      return index;
    };
    Tile tile(window, seen);
    tile.left = next(column_tiles) * tile_columns;
    tile.top = next(row_tiles) * tile_rows;
    tile.residue = next(row_classes);
    tile.head = next(heads);
    tile.b = item;
    tile.steps = class_steps(rows, tile.residue);
    tile.bottom = smaller(tile.top + tile_rows, tile.steps);
    tile.slots = slots;
    tile.width = smaller(tile_columns, columns.extent - tile.left);
    if (tile.width <= 0) return;
    tile.lanes = tiles(tile.width, kLanes<A>) * kLanes<A>;
    tile.columns = columns_seen;
    const int64_t before = columns.kernel / 2, after = columns.kernel - 1 - before;
    const bool queries = seen == Seen::queries;
    tile.shift = -(queries ? after : before) * columns.dilation;
    tile.slides = slides;
    tile.begin = 0;
    tile.end = tile.lanes;
    if (slides) {
      // Queries whose window is not around them; the keys that these see.
      const int64_t low = (queries ? columns.kernel : before) * columns.dilation;
      const int64_t high = (queries ? columns.kernel : after) * columns.dilation;
      tile.begin = clamp(low - tile.left, 0, tile.width);
      tile.end = clamp(columns.extent - high - tile.left, tile.begin, tile.width);
      tile.other_lanes([&](int64_t t) {
        const int64_t w = tile.left + t, step = w / columns.dilation;
        StepRange steps{step, step};
        if (t < tile.width) steps = steps_seen(columns, seen, step, class_steps(columns, w));
        tile.first[t] = static_cast<int32_t>(w + (steps.begin - step) * columns.dilation);
        tile.count[t] = static_cast<int32_t>(steps.end - steps.begin);
      });
    }
    // Where the windows of neighbouring lanes overlap one packed row serves all columns.
    const bool pieces = slides || columns.dilation >= tile.lanes;
    tile.step = pieces ? tile.lanes : columns.dilation;
    tile.stride = tiles(tile.lanes + (columns_seen - 1) * tile.step, kLanes<A>) * kLanes<A>;
    // An odd number of vectors: the channels do not meet in the same sets of a cache.
    if (tile.stride / kLanes<A> % 2 == 0 && slots * (tile.stride + kLanes<A>) <= kMaxWeights<A>) {
      tile.stride += kLanes<A>;
    }
    alignas(kVectorBytes) Scratch<A> scratch;
    if (tile.top < tile.bottom) f(tile, scratch);
  });
}

template <typename T>
void forward(const NeighborhoodAttentionForward& p, Threads threads) {
  using A = Accumulator<T>;
  const Window window = window_of(p);
  const bool save = element_count(p.weights) > 0, mixes = element_count(p.value) > 0;
  const bool zeros = p.border == Border::zeros;
  const int64_t kernel = window.columns.kernel, K = window.rows.kernel * kernel;
  const A outside = zeros ? A(0) : -static_cast<A>(__builtin_inff());
  const TensorView* bias = element_count(p.bias) > 0 ? &p.bias : nullptr;
  const auto compute = [&](const Tile& tile, Scratch<A>& scratch) {
    products<T>(tile, p.query, p.key, p.num_heads, static_cast<A>(p.scale), bias, outside, scratch);
    for (int64_t row = tile.top; row < tile.bottom; ++row) {
      A rest[kTileColumns];
      A* weights = weights_of_row(tile, scratch, row);
      const StepRange rows = tile.rows(row);
      const int64_t count = (rows.end - rows.begin) * kernel;
      softmax(weights, count, tile.lanes, zeros ? K - count : 0, rest);
      const int64_t above = (rows.begin - window_start(window.rows, row, tile.steps)) * kernel;
      for (int64_t n = 0; save && n < K; ++n) {
        const bool inside = n >= above && n < above + count;
        memcpy(weights_at<A>(p.weights, tile, n, tile.h(row)) + tile.left,
               inside ? weights + (n - above) * tile.lanes : rest, tile.width * sizeof(A));
      }
    }
    if (mixes) sums<T>(tile, p.output, p.value, p.num_heads, A(1), scratch);
  };
  for_tiles<A>(window, Seen::keys, p.query.size[0], p.num_heads, element_count(p.query) * K,
               threads, compute);
}

// d(logits) = weights * (d(weights) - sum of weights * d(weights)), and d(query).
template <typename T>
void backward_queries(const NeighborhoodAttentionBackward& p, Threads threads) {
  using A = Accumulator<T>;
  const Window window = window_of(p);
  const int64_t kernel = window.columns.kernel, K = window.rows.kernel * kernel;
  const auto compute = [&](const Tile& tile, Scratch<A>& scratch) {
    products<T>(tile, p.grad, p.value, p.num_heads, A(1), nullptr, A(0), scratch);
    for (int64_t row = tile.top; row < tile.bottom; ++row) {
      A mean[kTileColumns] = {};
      const StepRange rows = tile.rows(row);
      const int64_t count = (rows.end - rows.begin) * kernel, h = tile.h(row);
      const int64_t above = (rows.begin - window_start(window.rows, row, tile.steps)) * kernel;
      A* grads = weights_of_row(tile, scratch, row);
      for (int64_t n = 0; n < count; ++n) {
        const A* weight = weights_at<A>(p.weights, tile, above + n, h) + tile.left;
        for (int64_t t = 0; t < tile.width; ++t) mean[t] += weight[t] * grads[n * tile.lanes + t];
      }
      for (int64_t n = 0; n < count; ++n) {
        const A* weight = weights_at<A>(p.weights, tile, above + n, h) + tile.left;
        A* grad = grads + n * tile.lanes;
        for (int64_t t = 0; t < tile.width; ++t) grad[t] = weight[t] * (grad[t] - mean[t]);
        memcpy(weights_at<A>(p.grad_logits, tile, above + n, h) + tile.left, grad,
               tile.width * sizeof(A));
      }
    }
    sums<T>(tile, p.grad_query, p.key, p.num_heads, static_cast<A>(p.scale), scratch);
  };
  for_tiles<A>(window, Seen::keys, p.grad.size[0], p.num_heads, element_count(p.grad) * K, threads,
               compute);
}

// scratch.weights = for every key, the weights that it has in the windows of the queries it sees.
template <typename A>
void gather(const Tile& tile, const TensorView& from, Scratch<A>& scratch) {
  const WindowAxis& columns = tile.window.columns;
  const int64_t kernel = columns.kernel;
  for (int64_t row = tile.top; row < tile.bottom; ++row) {
    A* to = weights_of_row(tile, scratch, row);
    const StepRange rows = tile.rows(row);
    for (int64_t s = rows.begin; s < rows.end; ++s, to += tile.columns * tile.lanes) {
      const int64_t n = (row - window_start(tile.window.rows, s, tile.steps)) * kernel;
      const int64_t h = tile.h(s);
      for (int64_t j = 0; j < tile.columns; ++j) {
        pack(weights_at<A>(from, tile, n + clamp(kernel - 1 - j, 0, kernel), h),
             j < kernel ? columns.extent : 0, tile.column(j) + tile.begin, tile.end - tile.begin,
             to + j * tile.lanes + tile.begin);
      }
    }
  }
  tile.other_lanes([&](int64_t t) {
    const int64_t w = tile.left + t, steps = class_steps(columns, w);
    for (int64_t j = 0; j < tile.columns; ++j) {
      const int64_t x = tile.first[t] + j * columns.dilation;
      const bool sees = j < tile.count[t];
      const int64_t own =
          sees ? w / columns.dilation - window_start(columns, x / columns.dilation, steps) : 0;
      for (int64_t row = tile.top; row < tile.bottom; ++row) {
        A* to = weights_of_row(tile, scratch, row) + j * tile.lanes + t;
        const StepRange rows = tile.rows(row);
        for (int64_t s = rows.begin; s < rows.end; ++s, to += tile.columns * tile.lanes) {
          const int64_t n = (row - window_start(tile.window.rows, s, tile.steps)) * kernel + own;
          *to = sees ? weights_at<A>(from, tile, n, tile.h(s))[x] : 0;
        }
      }
    }
  });
}

// d(key) and d(value): each gathers from the queries that see it.
template <typename T>
void backward_keys(const NeighborhoodAttentionBackward& p, Threads threads) {
  using A = Accumulator<T>;
  const Window window = window_of(p);
  const auto compute = [&](const Tile& tile, Scratch<A>& scratch) {
    gather(tile, p.weights, scratch);
    sums<T>(tile, p.grad_value, p.grad, p.num_heads, A(1), scratch);
    gather(tile, p.grad_logits, scratch);
    sums<T>(tile, p.grad_key, p.query, p.num_heads, static_cast<A>(p.scale), scratch);
  };
  for_tiles<A>(window, Seen::queries, p.grad.size[0], p.num_heads,
               element_count(p.grad) * window.rows.kernel * window.columns.kernel, threads,
               compute);
}

template <typename Params, typename F>
const char* with_dtype(const Params& params, const F& f) {
  return dispatch(params, [&](auto tag) -> const char* {
    if (element_count(params.weights) > 0 && !unit_stride(params.weights, 4)) {
      return "the weights of a row must lie side by side";
    }
    f(tag);
    return nullptr;
  });
}

}  // namespace

const char* neighborhood_attention_forward_along_columns(const NeighborhoodAttentionForward& params,
                                                         Threads threads) {
  return with_dtype(params,
                    [&](auto tag) { forward<typename decltype(tag)::type>(params, threads); });
}

const char* neighborhood_attention_backward_along_columns(
    const NeighborhoodAttentionBackward& params, Threads threads) {
  return with_dtype(params, [&](auto tag) {
    backward_queries<typename decltype(tag)::type>(params, threads);
    backward_keys<typename decltype(tag)::type>(params, threads);
  });
}

}  // namespace CTXOPS_ISA
}  // namespace ctxops
